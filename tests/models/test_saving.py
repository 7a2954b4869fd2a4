"""The output folder: complete, loadable, exact, and safe whatever happens while it is written."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.helpers.encoders import write_safety_checker
from tests.helpers.pipelines import listing
from tests.helpers.script import UNET_FILE, run_python
from utils import PROGRAM
from utils.models import loading, saving
from utils.models.folder import read_base
from utils.run import record
from utils.runtime import libraries
from utils.runtime.colossal import boost, launch, leave
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


@pytest.fixture(scope="module")
def trained(tiny_pipeline_dir):
    """A function of the weight dtype's name: a boosted UNet whose master weights moved, its optimizer, its booster."""
    launch(0, dict, lambda own, other: [])

    def train(name: str) -> tuple:
        unet = loading.load_unet(read_base(tiny_pipeline_dir))
        flat = FlatParameters(unet, DTYPES[name], "cpu", torch.channels_last)
        optimizer = MasterWeightsOptimizer(flat, learning_rates=[1e-6])
        flat.grad.copy_(torch.randn(flat.grad.shape, generator=torch.Generator().manual_seed(0)))
        optimizer.step()
        return boost(unet, optimizer)

    yield train
    leave()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commit(output: Path, base: Path, content: bytes = b"new weights", **run) -> None:
    """A whole run's writing with a stand-in for the UNet's weights."""
    record.start_output(output, run)
    saving.commit_pipeline(
        output, read_base(base), lambda folder: (folder / Path(UNET_FILE).name).write_bytes(content)
    )


def load(folder: Path):
    with libraries.quiet_libraries():
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def commit_trained(output: Path, base: Path, parts: tuple, save_dtype: str, save_format: str) -> None:
    _, optimizer, _ = parts
    record.start_output(output, {})
    saving.commit_pipeline(
        output,
        read_base(base),
        lambda folder: saving.save_unet(optimizer.flat.named_masters(), folder, save_dtype, save_format),
    )


@pytest.mark.parametrize("save_format", ["safetensors", "bin"])
@pytest.mark.parametrize("save_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("weight_dtype", ["fp32", "fp16", "bf16"])
def test_the_file_holds_the_master_weights(
    tmp_path, trained, tiny_pipeline_dir, weight_dtype, save_dtype, save_format
):
    unet, optimizer, _ = parts = trained(weight_dtype)
    masters = dict(optimizer.flat.named_masters())
    before = {name: value.clone() for name, value in unet.unwrap().state_dict().items()}
    commit_trained(tmp_path / "out", tiny_pipeline_dir, parts, save_dtype, save_format)
    path = tmp_path / "out/unet" / f"diffusion_pytorch_model.{save_format}"
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".json"] == [path.name]
    saved = load_file(path) if save_format == "safetensors" else torch.load(path, weights_only=True)
    # From the masters in every case: a bf16 weight's rounding must not reach an fp16 file.
    expected = {name: value.to(DTYPES[save_dtype]) for name, value in masters.items()}
    assert saved.keys() == expected.keys() == before.keys()
    assert all(torch.equal(saved[name], expected[name]) and saved[name].is_contiguous() for name in saved)
    assert all(saved[name].dtype == DTYPES[save_dtype] for name in saved)
    # Saving is not the end of the weights in memory: nothing is cast.
    after = unet.unwrap().state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_the_folder_loads_and_samples(tmp_path, trained, tiny_pipeline_dir):
    parts = trained("fp32")
    commit_trained(tmp_path / "out", tiny_pipeline_dir, parts, "fp16", "bin")
    loaded = load(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    image = loaded("a photo", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    masters = dict(parts[1].flat.named_masters())
    for name, value in loaded.unet.state_dict().items():
        assert torch.equal(value.float(), masters[name].half().float())
    base = load(tiny_pipeline_dir)
    for part in ("vae", "text_encoder"):
        state_dict = getattr(base, part).state_dict()
        assert all(torch.equal(value, state_dict[n]) for n, value in getattr(loaded, part).state_dict().items())


def test_everything_but_the_weights_is_the_bases(tmp_path, tiny_pipeline_dir):
    commit(tmp_path / "out", tiny_pipeline_dir)
    expected, found = snapshot(tiny_pipeline_dir), snapshot(tmp_path / "out")
    index = json.loads(found.pop("model_index.json"))
    assert index == json.loads(expected.pop("model_index.json"))
    assert json.loads(found.pop("run.json"))["program"] == PROGRAM
    assert found.pop(UNET_FILE) == b"new weights" and expected.pop(UNET_FILE)
    assert found == expected


def test_what_is_not_read_is_left_behind_and_a_safety_checker_comes_along(tmp_path, base):
    write_safety_checker(base)
    (base / "scheduler/.ipynb_checkpoints").mkdir()
    (base / "scheduler/.ipynb_checkpoints/scheduler_config-checkpoint.json").write_text("{}")
    (base / "vae/Thumbs.db").write_text("x")
    (base / "vae/.DS_Store").write_text("x")
    (base / "tokenizer/.cache").write_text("x")
    (base / ".git").mkdir()
    (base / "samples").mkdir()
    (base / "unet/diffusion_pytorch_model.bin").write_text("old weights")
    (base / "v1-4.ckpt").write_text("another program's")
    commit(tmp_path / "out", base)
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not names & {".DS_Store", ".cache", ".git", "samples", "diffusion_pytorch_model.bin", "v1-4.ckpt"}
    assert not names & {".ipynb_checkpoints", "scheduler_config-checkpoint.json", "Thumbs.db"}
    found, wanted = (folder / "safety_checker/model.safetensors" for folder in (tmp_path / "out", base))
    assert found.read_bytes() == wanted.read_bytes()


def test_a_base_whose_index_names_a_part_that_it_lacks(tmp_path, base):
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (base / "model_index.json").write_text(json.dumps(index))
    commit(tmp_path / "out", base, (base / UNET_FILE).read_bytes())
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert load(tmp_path / "out").safety_checker is None


def test_no_file_of_the_result_is_the_bases_own(tmp_path, base, trained):
    """Who copies another VAE over the result's must not change the base's."""
    commit_trained(tmp_path / "out", base, trained("fp32"), "fp32", "safetensors")
    before = snapshot(base)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            assert path.stat().st_nlink == 1, path
            path.write_bytes(b"edited")
    assert snapshot(base) == before


def test_a_base_made_of_symbolic_links(tmp_path, base):
    """As a hub cache: every file is a link to a blob of another name."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in sorted(base.rglob("*")) if p.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    commit(tmp_path / "out", base, (base / UNET_FILE).read_bytes())
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    shutil.rmtree(blobs)
    load(tmp_path / "out")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path, base, trained, umask):
    before = os.umask(umask)
    try:
        commit_trained(tmp_path / "out", base, trained("fp32"), "fp32", "safetensors")
    finally:
        assert os.umask(before) == umask
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


def test_a_second_run_replaces_the_first_and_leaves_the_users_files(tmp_path, base):
    output = tmp_path / "out"
    write_safety_checker(base)
    commit(output, base, b"first")
    assert (output / "safety_checker").is_dir()
    (output / "notes.txt").write_text("mine")
    (output / "samples").mkdir()
    (output / "samples/1.png").write_text("mine")
    (output / "unet/diffusion_pytorch_model.bin").write_text("of an earlier format")
    shutil.rmtree(base / "safety_checker")
    commit(output, base, b"second", seed=7)
    assert (output / UNET_FILE).read_bytes() == b"second"
    assert (output / "notes.txt").read_text() == (output / "samples/1.png").read_text() == "mine"
    # Two UNet files, one of them stale, would leave it to the loader which one is meant.
    assert not (output / "unet/diffusion_pytorch_model.bin").exists()
    assert not (output / "safety_checker").exists()
    assert json.loads((output / "run.json").read_text())["seed"] == 7
    assert not list(output.glob(".*"))


class Crash(Exception):
    pass


def calls_of(patch, module, name: str, crash_at: int | None = None) -> list:
    """From now on; the one of that number (from 1) raises, later ones work, as they do for the clean-up after it."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) == crash_at:
            raise Crash(f"{name}, call {crash_at}")
        return original(*args, **kwargs)

    patch.setattr(module, name, function)
    return calls


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("module", "name"), [(os, "replace"), (os, "fsync"), (shutil, "copyfile")])
def test_a_crash_anywhere_leaves_the_old_pipeline_or_none(tmp_path, base, monkeypatch, module, name, existing):
    commit(tmp_path / "counted", base, b"first")
    with monkeypatch.context() as patch:
        calls = calls_of(patch, module, name)
        commit(tmp_path / "counted", base)
    before = listing(base)
    assert calls
    for number in range(1, len(calls) + 1):
        output = tmp_path / f"out-{number}"
        if existing:
            commit(output, base, b"old weights")
        old = snapshot(output)
        with monkeypatch.context() as patch:
            calls_of(patch, module, name, crash_at=number)
            try:
                commit(output, base)
                crashed = False
            except Crash:
                crashed = True
        assert crashed or not existing  # the first run has fewer calls to make
        found = snapshot(output)
        if not crashed or found.get(UNET_FILE) == b"new weights":
            found.pop("run.json")
            whole = snapshot(tmp_path / "counted")
            assert found == {key: value for key, value in whole.items() if key != "run.json"}
        elif existing:
            for ours in (old, found):
                ours.pop("run.json")
                ours.pop(".run.json.part", None)
            assert found == old, f"{name} call {number}"
        else:
            assert "model_index.json" not in found
        assert not list(output.glob(".assembling-*"))
        assert listing(base) == before


def test_a_kill_between_two_moves_leaves_no_half_pipeline_that_loads(tmp_path, base, monkeypatch):
    def visible(folder: Path) -> dict[str, bytes]:
        return {n: b for n, b in snapshot(folder).items() if not n.startswith(".") and n != "run.json"}

    commit(tmp_path / "out", base, b"old weights")
    old = visible(tmp_path / "out")
    (base / "scheduler/scheduler_config.json").write_text('{"of": "another base"}')
    commit(tmp_path / "new", base)
    new = visible(tmp_path / "new")
    original, indices = os.replace, []

    def replace(source, target):
        original(source, target)
        found = visible(tmp_path / "out")
        indices.append("model_index.json" in found)
        assert not indices[-1] or found in (old, new)

    monkeypatch.setattr(os, "replace", replace)
    commit(tmp_path / "out", base)
    assert False in indices and indices[-1] and visible(tmp_path / "out") == new


def test_no_space_for_a_pickle_is_a_failure_of_the_disk(tmp_path):
    """torch raises RuntimeError then; the kernel refuses here as a full disk does."""
    code = """
import pathlib, resource, sys, torch
from utils.models.saving import save_unet
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_unet([("a", torch.zeros(100_000))], pathlib.Path(sys.argv[1]), "fp32", "bin")
except OSError as error:
    print(error)
"""
    result = run_python(code, tmp_path)
    assert result.stdout.startswith("diffusion_pytorch_model.bin: ") and result.stdout.count("\n") == 1, result.stderr


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_start_at_a_multiple_of_eight_bytes(tmp_path, length):
    """As the format asks for: who maps the file into memory reads aligned numbers."""
    path, value = tmp_path / "a.safetensors", torch.randn(3, 4, 5).permute(2, 0, 1)
    saving.write_safetensors(path, [("x" * length, value), ("y", value[0])], torch.float32)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    found = load_file(path)
    assert torch.equal(found["x" * length], value) and torch.equal(found["y"], value[0])


@pytest.mark.gpu
def test_what_leaves_a_gpu_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PIECE", 64)
    values = {str(n): torch.randn(n, 3, 3, device="cuda").permute(2, 0, 1) for n in (1, 7, 8, 9, 50)}
    saving.write_safetensors(tmp_path / "a.safetensors", list(values.items()), torch.float32)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value.cpu()) for name, value in values.items())
