"""Which folder a base's name means: a file is converted once, the Hub's cache is read, nothing is downloaded."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import evaluating
from tests.helpers.pipelines import write_pipeline
from tests.helpers.script import EMBEDDED, dry_run, run, run_json, weight_change
from utils.errors import UserError
from utils.files.hashing import sha256_of
from utils.models.base import base_folder, cache_folder
from utils.models.check import check_base_model
from utils.models.folder import read_base
from utils.models.single_file import export_single_file, read_weights
from utils.models.weight_files import read_tensors

FLAG = "--pretrained_model_name_or_path"
NAME = "someone/a-model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def one_file(tmp_path, tiny_pipeline_dir) -> Path:
    export_single_file(read_base(tiny_pipeline_dir), tmp_path / "v1-4.safetensors")
    return tmp_path / "v1-4.safetensors"


def test_a_file_is_converted_once(one_file, own_cache, monkeypatch, capsys):
    folder = base_folder(one_file, FLAG)
    check_base_model(folder)
    assert folder.parent == own_cache and folder.name.startswith("v1-4-model-")
    assert f"converting it into {folder}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("utils.models.base.sha256_of", lambda path: pytest.fail("the file was read again"))
        assert base_folder(one_file, FLAG) == folder
    assert f"converted earlier, into {folder}" in capsys.readouterr().out
    os.utime(one_file, (1, 1))  # another time of change, the same content
    assert base_folder(one_file, FLAG) == folder


@pytest.mark.parametrize("of_the_same_time", [False, True])
def test_a_file_overwritten_by_another_of_its_size_is_converted_again(one_file, of_the_same_time):
    folder, found, content = base_folder(one_file, FLAG), one_file.stat(), bytearray(one_file.read_bytes())
    content[-1] ^= 1
    one_file.write_bytes(content)
    if of_the_same_time:
        os.utime(one_file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert base_folder(one_file, FLAG) != folder


@pytest.mark.parametrize("how", ["gone", "cut", "changed", "an earlier version's"])
def test_a_damaged_conversion_is_made_again(one_file, how):
    folder = base_folder(one_file, FLAG)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    spoilt = dict(cut=content[:-1], changed=content[:-1] + bytes([content[-1] ^ 1])).get(how, content)
    file.unlink() if how == "gone" else file.write_bytes(spoilt)
    if how.startswith("an earlier"):
        (folder / "source.json").write_text("{}")
    assert base_folder(one_file, FLAG) == folder and file.read_bytes() == content
    (folder / ".DS_Store").touch()
    file = folder / "unet/config.json"
    before = file.stat().st_ino
    assert base_folder(one_file, FLAG) == folder and file.stat().st_ino == before


def test_a_file_without_a_vae(one_file, tiny_pipeline_dir, own_cache):
    tensors, said = read_tensors(one_file)
    save_file({name: value for name, value in tensors.items() if not name.startswith("first_stage")}, one_file, said)
    with pytest.raises(UserError, match="v1-4.safetensors holds no VAE: give one with --pretrained_vae_name_or_path"):
        base_folder(one_file, FLAG)
    folder = base_folder(one_file, FLAG, tiny_pipeline_dir)
    check_base_model(folder)
    assert (folder / "vae").samefile(tiny_pipeline_dir / "vae")
    (folder / "vae").unlink()
    assert base_folder(one_file, FLAG, tiny_pipeline_dir) == folder and (folder / "vae").is_dir()


def test_several_processes_convert_one_file_once(tmp_path, one_file, monkeypatch):
    def slow_sha256(path: Path) -> str:
        time.sleep(0.5)  # so that all are here at once if they may be
        with (tmp_path / "conversions").open("a") as file:
            file.write("one\n")
        return sha256_of(path)

    monkeypatch.setattr("utils.models.base.sha256_of", slow_sha256)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = pool.starmap(base_folder, [(one_file, FLAG)] * 3, chunksize=1)
    assert len(set(folders)) == 1 and (tmp_path / "conversions").read_text() == "one\n"


def test_a_conversion_that_fails_leaves_nothing(tmp_path, one_file, own_cache):
    save_file({name: value for name, value in load_file(one_file).items() if "out.2.bias" not in name}, one_file)
    with pytest.raises(UserError, match="holds no whole UNet of Stable Diffusion v1"):
        base_folder(one_file, FLAG)
    assert [path.name for path in own_cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, one_file, monkeypatch):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "a-file" / "below"))
    with pytest.raises(UserError, match=r"cannot be written .*DREAMBOOTH_CACHE=DIR"):
        base_folder(one_file, FLAG)


def test_the_cache_is_where_such_things_are(monkeypatch):
    monkeypatch.delenv("DREAMBOOTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/train_dreambooth_colossalai")


def test_training_and_evaluation_take_a_file(flags, tmp_path):
    export_single_file(read_base(EMBEDDED), file := tmp_path / "v1-4.safetensors")
    output = tmp_path / "from-file"
    expected = run(flags, pretrained_model_name_or_path=EMBEDDED)
    found = run(flags, pretrained_model_name_or_path=file, output_dir=output)
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    assert run_json(output)["arguments"]["pretrained_model_name_or_path"] == str(file)
    assert weight_change(EMBEDDED, output).abs().max() > 0
    assert evaluating.run(output, tmp_path / "result", "--num_drift_images=0", "--only=generate") == 0
    assert (tmp_path / "result/baseline-1.png").is_file()


def test_a_file_has_clips_tokenizer_whatever_the_folder_had(flags, one_file):
    with pytest.raises(UserError, match="has token number .*the text encoder knows 514"):
        run(flags, pretrained_model_name_or_path=one_file)


def test_a_file_that_is_no_model_is_one_line(tmp_path, photos_dir, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"\x10")
    code, out, err = dry_run(tmp_path / "x.safetensors", photos_dir, tmp_path, capsys)
    assert code == 2 and err == "" and "x.safetensors is not a whole safetensors file" in out


@pytest.mark.parametrize("how", ["folder", "pipeline", "file", "original file"])
def test_another_vae_is_trained_with_saved_and_evaluated(flags, tmp_path, how):
    other = write_pipeline(tmp_path / "other", seed=1)
    vae = dict(folder=other / "vae", file=other / "vae/diffusion_pytorch_model.safetensors").get(how, other)
    if how == "original file":
        export_single_file(read_base(other), vae := tmp_path / "whole.safetensors")
    own = run(flags)
    output = tmp_path / "with-vae"
    found = run(flags, pretrained_vae_name_or_path=vae, output_dir=output)
    assert [row["loss"] for row in found] != [row["loss"] for row in own]
    expected = read_weights(other, "vae")
    assert all(torch.equal(value, expected[name]) for name, value in read_weights(output, "vae").items())
    baseline = base_folder(Path(flags["pretrained_model_name_or_path"]), FLAG, vae)
    assert all(torch.equal(value, expected[name]) for name, value in read_weights(baseline, "vae").items())
    assert baseline == base_folder(Path(flags["pretrained_model_name_or_path"]), FLAG, vae)


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_what_is_no_vae_is_refused(tmp_path, tiny_pipeline_dir, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--pretrained_vae_name_or_path .*{what} is no VAE"):
        base_folder(tiny_pipeline_dir, FLAG, tmp_path / what)


@pytest.fixture
def hub(tmp_path, tiny_pipeline_dir, monkeypatch) -> Path:
    """The Hub's cache with one model in it, as links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub/models--someone--a-model"
    shutil.copytree(tiny_pipeline_dir, model / "snapshots/abc")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("abc")
    return model


def test_a_name_of_the_hub_is_looked_up_in_the_local_cache(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path(NAME), hub / "snapshots/abc"):
        assert base_folder(path, FLAG).samefile(hub / "snapshots/abc")
    assert base_folder(Path("someone/else"), FLAG) == Path("someone/else")  # the checks say how to fetch it


def test_a_model_in_the_hubs_cache_is_not_taken_for_a_snapshot_of_it(hub):
    with pytest.raises(UserError, match="it is a model in the Hub's cache: name it as on the Hub, or .*snapshots"):
        check_base_model(base_folder(hub, FLAG))
    (hub / "refs/main").unlink()
    assert base_folder(Path(NAME), FLAG) == Path(NAME)
