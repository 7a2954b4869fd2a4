"""Which folders may be written to."""

import json
import os
from pathlib import Path

import pytest

from tests.helpers.pipelines import listing
from tests.helpers.script import as_argv, make_args
from train_dreambooth_colossalai import main
from utils import PROGRAM
from utils.errors import UserError
from utils.files.ownership import is_own_output
from utils.models.check import check_base_model
from utils.preflight.checks import check_output
from utils.preflight.table import Found

LEFT = [".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", "._photo.jpg", "@eaDir"]
KILLED = [".run.json.part", ".README.md.17.part", ".assembling-x", "..train_dreambooth.holder.3.part"]


def check(tmp_path: Path, **values) -> None:
    check_output(Found(make_args(tmp_path, **values), is_quick=True))


class TestOutputDir:
    """check_output, with base/, photos/ and elsewhere/ in tmp_path."""

    @pytest.fixture(autouse=True)
    def folders(self, tmp_path):
        for name in ("base/unet", "photos/more", "elsewhere"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "photos/a.jpg").write_text("photo")
        (tmp_path / "to_base").symlink_to(tmp_path / "base")
        (tmp_path / "to_all").symlink_to(tmp_path)

    def refuse(self, tmp_path: Path, output: Path, message: str, **values) -> None:
        before = listing(tmp_path)
        with pytest.raises(UserError, match=message) as error:
            check(tmp_path, output_dir=output, **values)
        assert "--output_dir" in str(error.value) and "\n" not in str(error.value)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize(
        ("flag", "outputs"),
        [
            ("pretrained_model_name_or_path", "base base/out base/unet to_base to_base/x to_all/base/x ."),
            ("instance_data_dir", "photos photos/new/out base/../photos to_all/photos/more"),
            ("tokenizer_name", "elsewhere/out"),
        ],
    )
    def test_overlap(self, tmp_path, flag, outputs):
        for output in outputs.split():
            self.refuse(tmp_path, tmp_path / output, f"overlaps --{flag}", tokenizer_name=tmp_path / "elsewhere")

    def test_overlap_where_the_inputs_are_links_or_relative(self, tmp_path, monkeypatch):
        links = dict(pretrained_model_name_or_path=tmp_path / "to_base")
        self.refuse(tmp_path, tmp_path / "base/x", "overlaps --pretrained_model_name_or_path", **links)
        monkeypatch.chdir(tmp_path / "base")
        self.refuse(tmp_path, Path("x"), "overlaps --pretrained", pretrained_model_name_or_path=".")

    def test_overlap_on_a_disk_that_does_not_tell_upper_from_lower_case(self, tmp_path, monkeypatch):
        samefile, start = Path.samefile, len(str(tmp_path))

        def lower(path) -> Path:
            return Path(str(path)[:start] + str(path)[start:].lower())

        monkeypatch.setattr(Path, "samefile", lambda one, other: samefile(lower(one), lower(other)))
        monkeypatch.setattr(Path, "stat", lambda path, **options: os.stat(lower(path)))
        self.refuse(tmp_path, tmp_path / "Photos/out", "overlaps --instance_data_dir")

    @pytest.mark.parametrize("name", [*LEFT, *KILLED])
    def test_a_folder_with_what_systems_and_kills_leave_there_is_empty(self, tmp_path, name):
        (tmp_path / "elsewhere" / name).mkdir()
        (tmp_path / "elsewhere/.ipynb_checkpoints").mkdir()
        check(tmp_path, output_dir=tmp_path / "elsewhere")

    def test_foreign_files_are_named(self, tmp_path):
        for name in ("b.txt", "a.txt", "d\ne", "c", "Thumbs.db"):
            (tmp_path / "elsewhere" / name).touch()
        said = r"holds files that this program did not write \('a.txt', 'b.txt', 'c' and 1 more\)"
        self.refuse(tmp_path, tmp_path / "elsewhere", said)

    def test_a_common_beginning_of_the_name_is_no_overlap(self, tmp_path):
        check(tmp_path, output_dir=tmp_path / "base-new")
        check(tmp_path, output_dir=tmp_path / "photo")

    @pytest.mark.parametrize("run", ["{}", "[]", "{", '{"program": "another"}', '"train_dreambooth_colossalai"'])
    def test_a_run_json_of_another_program(self, tmp_path, run):
        (tmp_path / "elsewhere/run.json").write_text(run)
        assert not is_own_output(tmp_path / "elsewhere")
        self.refuse(tmp_path, tmp_path / "elsewhere", "holds files that this program did not write")

    def test_a_checkpoint_beside_a_damaged_run_json_is_named(self, tmp_path):
        (tmp_path / "elsewhere/checkpoint-2").mkdir()
        (tmp_path / "elsewhere/run.json").write_text('{"program": "train_dr')
        (tmp_path / "elsewhere/checkpoint-2/state.json").write_text(
            json.dumps(dict(program=PROGRAM, format=1, step=2))
        )
        self.refuse(tmp_path, tmp_path / "elsewhere", "checkpoint-2 is ours: a new folder can go on --resume")

    def test_a_file_or_a_dead_link(self, tmp_path):
        (tmp_path / "elsewhere/file").write_text("mine")
        (tmp_path / "elsewhere/link").symlink_to(tmp_path / "nowhere")
        for name in ("file", "link"):
            self.refuse(tmp_path, tmp_path / "elsewhere" / name, "is not a folder")
        for mode in (0o644, 0o755):
            (tmp_path / "elsewhere/file").chmod(mode)
            self.refuse(tmp_path, tmp_path / "elsewhere/file/out", "elsewhere/file is a file")

    def test_no_permission(self, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.files.ownership.os.access", lambda path, mode: False)
        self.refuse(tmp_path, tmp_path / "elsewhere/a/b", "nothing can be written in .*elsewhere$")

    def test_new_empty_and_own_folders_pass_and_nothing_is_made(self, tmp_path):
        own = tmp_path / "own"
        own.mkdir()
        (own / "run.json").write_text('{"program": "train_dreambooth_colossalai"}')
        (own / "notes.txt").write_text("mine")
        (tmp_path / "to_elsewhere").symlink_to(tmp_path / "elsewhere")
        before = listing(tmp_path)
        for output in ("new", "new/deep/er", "elsewhere", "to_elsewhere", "own"):
            check(tmp_path, output_dir=tmp_path / output)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize(
        "folder", ["unet", "vae", "UNet/deeper", "validation", "checkpoint-2/unet", "../out/unet"]
    )
    def test_a_single_file_among_the_runs_own(self, tmp_path, folder):
        file = tmp_path / "out" / folder / "diffusion_pytorch_model.safetensors"
        with pytest.raises(UserError, match="--export_single_file .* lies among the run's own files"):
            check(tmp_path, output_dir=tmp_path / "out", export_single_file=file)

    @pytest.mark.parametrize("folder", ["out", "out/files", "elsewhere/unet"])
    def test_a_single_file_in_the_output_folder_or_elsewhere(self, tmp_path, folder):
        check(tmp_path, output_dir=tmp_path / "out", export_single_file=tmp_path / folder / "cat.safetensors")


def test_overlap_with_another_vae_as_the_script_finds_it(flags, base):
    flags |= dict(pretrained_vae_name_or_path=base / "vae", output_dir=base / "vae/out")
    with pytest.raises(UserError, match="--output_dir .* overlaps --pretrained_vae_name_or_path"):
        main(as_argv(flags))


def test_a_base_that_is_a_circle(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="does not exist"):
        check_base_model(tmp_path / "circle")
