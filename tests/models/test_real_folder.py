"""Stable Diffusion v1.4's real folder, in its revisions: trained, exported, shared, and what is said of it."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.helpers.real_folder import REFUSED, REVISIONS, write_main
from tests.helpers.script import SHORT, dry_run, losses, run, run_json
from utils import export, share
from utils.files.json_files import read_json
from utils.models.base import base_folder
from utils.models.folder import read_base
from utils.models.single_file import original_text_name, read_weights


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_main(tmp_path_factory.mktemp("published") / "stable-diffusion-v1-4")


@pytest.fixture
def revision(published, tmp_path):
    """A function of a revision's name: its folder."""

    def made(name: str) -> Path:
        (REVISIONS | REFUSED)[name](folder := shutil.copytree(published, tmp_path / "v1-4"))
        return folder

    return made


@pytest.fixture(scope="module")
def expected(published, tmp_path_factory, photos_dir) -> list[float]:
    """The losses of the plain float32 weights."""
    output = tmp_path_factory.mktemp("expected") / "output"
    return train(published, photos_dir, output)


def train(base: Path, photos: Path, output: Path) -> list[float]:
    """The losses of two steps."""
    inputs = dict(pretrained_model_name_or_path=base, instance_data_dir=photos, output_dir=output)
    return losses(run(SHORT | inputs, max_train_steps=2))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")  # of the first commit
@pytest.mark.parametrize("name", REVISIONS)
def test_a_revision_is_trained_exported_and_shared(revision, tmp_path, photos_dir, expected, capfd, name):
    base, output = revision(name), tmp_path / "output"
    found = train(base, photos_dir, output)
    said = "".join(capfd.readouterr())
    assert "An error occurred" not in said and "Traceback" not in said
    has_checker = not name.startswith("checker")
    assert ("the result gets no safety checker" in said) == (not has_checker)
    assert found == (pytest.approx(expected, rel=1e-2) if "fp16" in name else expected)
    index = read_json(output / "model_index.json")
    assert (index["safety_checker"] == [None, None]) == (not has_checker) == (not (output / "safety_checker").exists())
    for folder in (output, tmp_path / "shared"):
        if folder != output:
            share.main([str(output), str(folder)])
        assert (StableDiffusionPipeline.from_pretrained(folder).safety_checker is not None) == has_checker
        names = [path.relative_to(folder) for path in folder.rglob("*") if path.name != ".train_dreambooth.lock"]
        assert not [name for name in names if any(part.startswith(".") for part in name.parts)]
        assert not list(folder.glob("*/*.non_ema.*")) and not list(folder.glob("*/*.fp16.*"))
    export.main([str(output), str(tmp_path / "one.safetensors")])
    again = base_folder(tmp_path / "one.safetensors", "")
    for part in ("unet", "vae", "text_encoder"):
        wanted, found = ({original_text_name(k): v for k, v in read_weights(f, part).items()} for f in (output, again))
        wanted.pop("text_model.embeddings.position_ids", None)
        assert found.keys() == wanted.keys() and all(torch.equal(value, found[key]) for key, value in wanted.items())


@pytest.mark.parametrize("name", REFUSED)
def test_weights_of_flax_and_onnx_are_refused_as_such(revision, tmp_path, photos_dir, capsys, name):
    code, out, _ = dry_run(revision(name), photos_dir, tmp_path, capsys)
    (line,) = [line for line in out.splitlines() if line.startswith("STOP")]
    assert code == 2 and "Flax" in line and "ONNX" in line


def test_only_what_is_read_is_hashed(revision, tmp_path, photos_dir):
    """Of the 46 GB that a clone takes on the disk, 5.5."""
    base = revision("main")
    train(base, photos_dir, tmp_path / "output")
    hashed = run_json(tmp_path / "output")["base_model"]["sha256"]
    weights = {name for name in hashed if name.endswith(("bin", "safetensors"))}
    stem = "diffusion_pytorch_model.safetensors"
    parts = ("text_encoder", "safety_checker")  # the latter is only copied
    assert weights == {f"unet/{stem}", f"vae/{stem}", *(f"{part}/model.safetensors" for part in parts)}
    assert not [name for name in hashed if "ipynb" in name] and len(read_base(base).weights) == 4
