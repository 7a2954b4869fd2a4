"""What is checked before a model is loaded: every complaint, and that complaining touches nothing."""

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import write_photos, write_pipeline
from tests.helpers.script import ROOT
from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.errors import UserError
from utils.preflight import (
    check_base_model,
    check_output_dir,
    check_resolution,
    default_save_dtype,
    is_own_output,
    safetensors_dtype,
    weight_files,
)

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder with its mode, size and time of change."""
    entries = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (found.st_mode, found.st_size, found.st_mtime_ns, found.st_ino) for name, found in entries.items()}


@pytest.fixture
def base(tmp_path, tiny_pipeline_dir) -> Path:
    """A copy of the tiny pipeline to spoil."""
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "base")


def edit_json(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_index(folder: Path, part: str, value) -> None:
    edit_json(folder / "model_index.json", **{part: value})


def make_args(tmp_path: Path, **values):
    """Parsed arguments whose folders are all below tmp_path."""
    flags = dict(
        pretrained_model_name_or_path=tmp_path / "base",
        instance_data_dir=tmp_path / "photos",
        output_dir=tmp_path / "output",
        instance_prompt="a photo",
    )
    flags |= values
    return parse_args([text for name, value in flags.items() for text in (f"--{name}", str(value))])


def test_a_complete_pipeline_passes(tiny_pipeline_dir):
    model = check_base_model(tiny_pipeline_dir)
    assert model == (tiny_pipeline_dir, 4, [tiny_pipeline_dir / UNET_FILE])


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def rename_weights(folder: Path, suffix: str) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", suffix)))


SPOILT = {
    "no index": (lambda b: (b / "model_index.json").unlink(), r"has no model_index\.json, so it is not a complete"),
    "index no JSON": (lambda b: (b / "model_index.json").write_text("{"), r"model_index\.json cannot be read as JSON"),
    "index not UTF-8": (lambda b: (b / "model_index.json").write_bytes(b"\xff\xfe{"), r"cannot be read as JSON"),
    "index a list": (lambda b: (b / "model_index.json").write_text("[]"), r"does not hold a JSON object"),
    "unet class": (
        lambda b: edit_index(b, "unet", ["diffusers", "SD3Transformer2DModel"]),
        r"model_index\.json: unet is 'SD3Transformer2DModel', but .* is UNet2DConditionModel",
    ),
    "vae class": (lambda b: edit_index(b, "vae", ["diffusers", "VQModel"]), "vae is 'VQModel'.*AutoencoderKL"),
    "text encoder class": (
        lambda b: edit_index(b, "text_encoder", ["transformers", "T5EncoderModel"]),
        "text_encoder is 'T5EncoderModel'.*CLIPTextModel",
    ),
    "part null": (lambda b: edit_index(b, "vae", [None, None]), "vae is None, but"),
    "part not named": (lambda b: edit_index(b, "unet", None), "unet is None, but"),
    "no unet folder": (lambda b: shutil.rmtree(b / "unet"), r"lacks unet/config\.json"),
    "no vae config": (lambda b: (b / "vae" / "config.json").unlink(), r"lacks vae/config\.json"),
    "unet config no JSON": (lambda b: (b / "unet/config.json").write_text("no"), r"unet/config\.json cannot be read"),
    "no tokenizer": (lambda b: shutil.rmtree(b / "tokenizer"), "lacks tokenizer/"),
    "empty tokenizer": (lambda b: (b / "tokenizer/vocab.json").unlink(), r"lacks tokenizer/vocab\.json"),
    "no scheduler": (lambda b: shutil.rmtree(b / "scheduler"), r"scheduler/scheduler_config\.json is missing"),
    "scheduler no JSON": (
        lambda b: (b / "scheduler/scheduler_config.json").write_text("{]"),
        r"scheduler_config\.json cannot be read as JSON",
    ),
    "prediction type": (
        lambda b: edit_json(b / "scheduler/scheduler_config.json", prediction_type="sample"),
        r"scheduler_config\.json: prediction_type is 'sample'; this program trains epsilon and v_prediction",
    ),
    "inpainting": (
        lambda b: edit_json(b / "unet/config.json", in_channels=9),
        "in_channels is 9, but the VAE's latents have 4; inpainting and depth models cannot be trained",
    ),
    "cross attention": (
        lambda b: edit_json(b / "unet/config.json", cross_attention_dim=1024),
        "hidden_size is 16, but the UNet's cross_attention_dim is 1024",
    ),
    "no unet weights": (lambda b: (b / UNET_FILE).unlink(), r"unet holds no weights \(diffusion_pytorch_model\.safe"),
    "no vae weights": (lambda b: next((b / "vae").glob("*.safetensors")).unlink(), "vae holds no weights"),
    "no text encoder weights": (
        lambda b: (b / "text_encoder/model.safetensors").unlink(),
        r"text_encoder holds no weights \(model\.safetensors\)",
    ),
    "lfs pointer": (
        lambda b: (b / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a git-lfs pointer, not the weights; run 'git lfs install && git lfs pull' in",
    ),
    "lfs pointer in the text encoder": (
        lambda b: (b / "text_encoder/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"text_encoder/model\.safetensors is a git-lfs pointer",
    ),
    "dead link": (
        lambda b: ((b / UNET_FILE).unlink(), (b / UNET_FILE).symlink_to(b / "blob")),
        r"unet/diffusion_pytorch_model\.safetensors cannot be read \(No such file",
    ),
    "empty weights": (lambda b: cut(b / UNET_FILE, 0), "is not a whole safetensors file"),
    "unet cut short": (lambda b: cut(b / UNET_FILE, 5000), "is not a whole safetensors file"),
    "vae cut by a byte": (
        lambda b: cut(b / "vae/diffusion_pytorch_model.safetensors", -1),
        r"vae/diffusion_pytorch_model\.safetensors is not a whole safetensors file \(its header promises",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_unfit_base_is_refused_by_name_and_left_as_it_was(tmp_path, base, case):
    spoil, message = SPOILT[case]
    spoil(base)
    write_photos(tmp_path / "photos", 1)
    before = listing(tmp_path)
    argv = ["--pretrained_model_name_or_path", base, "--instance_data_dir", tmp_path / "photos"]
    argv += ["--instance_prompt", "a photo", "--output_dir", tmp_path / "new" / "output"]
    with pytest.raises(UserError, match=message) as error:
        main([str(value) for value in argv])
    assert str(base) in str(error.value) and "\n" not in str(error.value)
    assert listing(tmp_path) == before


def test_a_name_on_the_hub_is_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="nothing is downloaded .* https://huggingface.co/CompVis/stable-diffusion-v1-4 "
    ):
        check_base_model(Path("CompVis/stable-diffusion-v1-4"))


@pytest.mark.parametrize("name", ["missing", "/no/where", "./model/sd", "../a/b", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_name_on_the_hub(monkeypatch, tmp_path, name):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: there is no folder") as error:
        check_base_model(Path(name))
    assert "huggingface" not in str(error.value)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="model.safetensors is a file; name the pipeline's folder"):
        check_base_model(tmp_path / "model.safetensors")


def test_configurations_may_leave_out_defaults(base):
    config = json.loads((base / "vae/config.json").read_text())
    del config["block_out_channels"], config["latent_channels"]
    (base / "vae/config.json").write_text(json.dumps(config))
    assert check_base_model(base).vae_scale_factor == 1


def test_weights_may_be_bin_or_variants(base):
    rename_weights(base, ".fp16.safetensors")
    assert check_base_model(base).unet_weights == [base / "unet/diffusion_pytorch_model.fp16.safetensors"]
    (base / "text_encoder/model.fp16.safetensors").unlink()
    torch.save({}, base / "text_encoder/pytorch_model.bin")
    assert weight_files(base, "text_encoder") == [base / "text_encoder/pytorch_model.bin"]


@pytest.mark.parametrize(("resolution", "near"), [(33, "32 or 36"), (3, "4"), (31, "28 or 32")])
def test_a_resolution_that_the_vae_cannot_encode(tmp_path, base, resolution, near):
    args = make_args(tmp_path, resolution=resolution)
    with pytest.raises(
        UserError, match=f"--resolution {resolution} is not divisible by the VAE's factor 4; use {near}"
    ):
        check_resolution(args, check_base_model(base))


@pytest.mark.parametrize("resolution", [4, 32, 36])
def test_a_resolution_that_the_vae_can_encode(tmp_path, base, resolution):
    check_resolution(make_args(tmp_path, resolution=resolution), check_base_model(base))


class TestOutputDir:
    """check_output_dir, with base/, photos/ and elsewhere/ in tmp_path."""

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
            check_output_dir(make_args(tmp_path, output_dir=output, **values))
        assert "--output_dir" in str(error.value) and "\n" not in str(error.value)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("output", ["base", "base/out", "base/unet", "to_base", "to_base/x", "to_all/base/x", "."])
    def test_overlap_with_the_base(self, tmp_path, output):
        self.refuse(tmp_path, tmp_path / output, "overlaps --pretrained_model_name_or_path")

    @pytest.mark.parametrize("output", ["photos", "photos/new/out", "base/../photos", "to_all/photos/more"])
    def test_overlap_with_the_photos(self, tmp_path, output):
        self.refuse(tmp_path, tmp_path / output, "overlaps --instance_data_dir")

    def test_overlap_where_the_inputs_are_named_through_links(self, tmp_path):
        links = dict(pretrained_model_name_or_path=tmp_path / "to_base")
        self.refuse(tmp_path, tmp_path / "base/x", "overlaps --pretrained_model_name_or_path", **links)

    def test_overlap_with_relative_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path / "base")
        self.refuse(tmp_path, Path("x"), "overlaps --pretrained", pretrained_model_name_or_path=".")

    def test_overlap_with_another_tokenizer(self, tmp_path):
        folder = tmp_path / "elsewhere"
        self.refuse(tmp_path, folder / "out", "overlaps --tokenizer_name", tokenizer_name=folder)

    def test_a_common_beginning_of_the_name_is_no_overlap(self, tmp_path):
        check_output_dir(make_args(tmp_path, output_dir=tmp_path / "base-new"))
        check_output_dir(make_args(tmp_path, output_dir=tmp_path / "photo"))

    def test_foreign_files(self, tmp_path):
        (tmp_path / "elsewhere/thesis.txt").write_text("mine")
        self.refuse(tmp_path, tmp_path / "elsewhere", "holds files that this program did not write")

    @pytest.mark.parametrize("run", ["{}", "[]", "{", '{"program": "another"}', '"train_dreambooth_colossalai"'])
    def test_a_run_json_of_another_program(self, tmp_path, run):
        (tmp_path / "elsewhere/run.json").write_text(run)
        assert not is_own_output(tmp_path / "elsewhere")
        self.refuse(tmp_path, tmp_path / "elsewhere", "holds files that this program did not write")

    def test_a_file(self, tmp_path):
        (tmp_path / "elsewhere/file").write_text("mine")
        self.refuse(tmp_path, tmp_path / "elsewhere/file", "is not a folder")
        self.refuse(tmp_path, tmp_path / "elsewhere/file/out", "elsewhere/file is a file")
        (tmp_path / "elsewhere/file").chmod(0o755)
        self.refuse(tmp_path, tmp_path / "elsewhere/file/out", "elsewhere/file is a file")

    def test_a_dead_link(self, tmp_path):
        (tmp_path / "elsewhere/link").symlink_to(tmp_path / "nowhere")
        self.refuse(tmp_path, tmp_path / "elsewhere/link", "is not a folder")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_no_permission(self, tmp_path):
        (tmp_path / "elsewhere").chmod(stat.S_IRUSR | stat.S_IXUSR)
        self.refuse(tmp_path, tmp_path / "elsewhere/a/b", "no permission to write in .*elsewhere$")

    def test_no_permission_as_the_system_says_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.preflight.os.access", lambda path, mode: False)
        self.refuse(tmp_path, tmp_path / "elsewhere/a/b", "no permission to write in .*elsewhere$")

    def test_new_empty_and_own_folders_pass_and_nothing_is_made(self, tmp_path):
        own = tmp_path / "own"
        own.mkdir()
        (own / "run.json").write_text('{"program": "train_dreambooth_colossalai"}')
        (own / "notes.txt").write_text("mine")
        (tmp_path / "to_elsewhere").symlink_to(tmp_path / "elsewhere")
        before = listing(tmp_path)
        for output in ("new", "new/deep/er", "elsewhere", "to_elsewhere", "own"):
            check_output_dir(make_args(tmp_path, output_dir=tmp_path / output))
        assert listing(tmp_path) == before


def write_header(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", None),
        (b"{", None),
        (b"{}", 1 << 62),
        (b"\xff\xff", None),
        (b"[]", None),
        (b"7", None),
        (b'{"a": 7}', None),
        (b'{"a": {"shape": [1]}}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": []}}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": [0, "x"]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None),
    ],
)
def test_a_lying_safetensors_header_is_refused(tmp_path, header, length):
    path = write_header(tmp_path / "a.safetensors", header, length)
    with pytest.raises(UserError, match=r"a\.safetensors is not a (whole )?safetensors file") as error:
        safetensors_dtype(path)
    assert "\n" not in str(error.value)


def test_the_dtype_in_a_safetensors_header(tmp_path):
    path = tmp_path / "a.safetensors"
    for dtype, name in ((torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")):
        save_file({"a": torch.zeros(3, dtype=dtype)}, path, {"format": "pt"})
        assert safetensors_dtype(path) == name
    assert safetensors_dtype(write_header(path, b'{"__metadata__": {"format": "pt"}}')) is None


def weights_file(folder: Path, name: str, dtype: torch.dtype) -> Path:
    path = folder / name
    tensors = {"a": torch.zeros(3, dtype=dtype)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({f"{STEM}.safetensors": torch.float32}, "fp32"),
        ({f"{STEM}.safetensors": torch.float16}, "fp16"),
        ({f"{STEM}.safetensors": torch.bfloat16}, "fp32"),
        ({f"{STEM}.bin": torch.float32}, "fp32"),
        ({f"{STEM}.bin": torch.float16}, "fp16"),
        ({f"{STEM}.fp16.safetensors": torch.float16}, "fp16"),
        ({f"{STEM}.fp16.bin": torch.float16}, "fp16"),
        ({f"{STEM}.fp16.safetensors": torch.float16, f"{STEM}.safetensors": torch.float32}, "fp32"),
        ({f"{STEM}.fp16.safetensors": torch.float16, f"{STEM}.bin": torch.float32}, "fp32"),
        ({f"{STEM}.bin": torch.float16, f"{STEM}.safetensors": torch.float32}, "fp32"),
    ],
)
def test_the_output_has_the_dtype_of_the_file_that_is_loaded(tmp_path, files, expected):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
    for name, dtype in files.items():
        weights_file(tmp_path / "unet", name, dtype)
    assert default_save_dtype(weight_files(tmp_path, "unet")) == expected


def test_bin_files_of_before_torch_1_6(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(3, dtype=torch.float16)}, path, _use_new_zipfile_serialization=False)
    assert default_save_dtype([path]) == "fp16"


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."])
def test_a_bin_file_without_weights_is_refused_and_runs_nothing(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.bin is not a file of weights") as error:
        default_save_dtype([tmp_path / "a.bin"])
    assert "\n" not in str(error.value)


def test_an_empty_bin_file_of_weights_is_refused(tmp_path):
    torch.save({}, tmp_path / "a.bin")
    with pytest.raises(UserError, match="there is none in it"):
        default_save_dtype([tmp_path / "a.bin"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused_when_loaded(tmp_path, base, part):
    from utils import models

    path = next((base / part).glob("*.safetensors"))
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    load = dict(unet=lambda: models.load_unet(base)).get(part)
    load = load or (lambda: getattr(models, f"load_{part}")(base, torch.float32, "cpu"))
    with pytest.raises(UserError, match=f"{part}.*(lacks 1 of|keys are missing).*{lost.split('.')[-1]}"):
        load()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_another_shape_are_refused_when_loaded(base, part):
    from utils import models

    path = next((base / part).glob("*.safetensors"))
    tensors = load_file(path)
    tensors[sorted(tensors)[0]] = torch.zeros(1, 1)
    save_file(tensors, path, {"format": "pt"})
    load = dict(unet=lambda: models.load_unet(base)).get(part)
    load = load or (lambda: getattr(models, f"load_{part}")(base, torch.float32, "cpu"))
    with pytest.raises(UserError, match=f"{part} cannot be loaded as a"):
        load()


def test_another_tokenizer_is_a_tokenizers_folder(tmp_path, tiny_pipeline_dir):
    from utils.models import load_tokenizer

    assert load_tokenizer(tiny_pipeline_dir, tiny_pipeline_dir / "tokenizer").model_max_length == 77
    for name in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="--tokenizer_name .* no tokenizer_config.json in it"):
            load_tokenizer(tiny_pipeline_dir, name)


def run_python(code: str, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *(str(value) for value in argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


IMPORTED = """
import sys
from train_dreambooth_colossalai import main
from utils.errors import run_main
try:
    code = run_main(main)
except SystemExit as exit:
    code = exit.code
heavy = [name for name in ("torch", "numpy", "PIL", "diffusers", "transformers", "colossalai") if name in sys.modules]
print("exit code", code, "imported", heavy)
"""


@pytest.mark.parametrize("case", ["help", "unknown flag", "no base", "resolution", "foreign output"])
def test_complaints_come_before_torch_is_imported(tmp_path, base, case):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.txt").write_text("mine")
    argv = ["--pretrained_model_name_or_path", base, "--instance_data_dir", tmp_path / "photos"]
    argv += ["--instance_prompt", "a photo"]
    argv += {
        "help": ["--help"],
        "unknown flag": ["--lr", "1"],
        "no base": ["--pretrained_model_name_or_path", tmp_path / "missing"],
        "resolution": ["--resolution", "31", "--output_dir", tmp_path / "new"],
        "foreign output": ["--output_dir", tmp_path / "elsewhere"],
    }[case]
    before = listing(tmp_path)
    result = run_python(IMPORTED, *argv)
    expected = 0 if case == "help" else 2
    assert result.stdout.splitlines()[-1] == f"exit code {expected} imported []"
    lines = result.stderr.splitlines()
    assert lines == [] if case == "help" else (len(lines) == 1 and lines[0].startswith("error: "))
    assert listing(tmp_path) == before


def test_help_is_instant():
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "train_dreambooth_colossalai.py", "--help"], cwd=ROOT, capture_output=True)
        durations.append(time.perf_counter() - started)
    assert min(durations) < 1


def test_an_fp16_pipeline_is_loaded_in_fp32_for_the_masters(tmp_path):
    from utils.models import load_unet

    folder = write_pipeline(tmp_path / "half", dtype=torch.float16)
    assert default_save_dtype(check_base_model(folder).unet_weights) == "fp16"
    assert {p.dtype for p in load_unet(folder).parameters()} == {torch.float32}
