"""The training script from its arguments to its files: in this process, and as its users start it."""

import hashlib
import math
import re
import shlex
from importlib import metadata
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.pipelines import write_512_pixel_pipeline, write_photos, write_pipeline
from tests.helpers.script import ROOT, UNET_FILE, as_argv, launch, losses, rows, run, run_json, weight_change
from tests.helpers.tolerances import ANOTHER_ORDER, what_decides_last_bits
from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.command_line import run_main
from utils.models.weight_files import read_onto
from utils.run.plan import make_plan


def test_a_run_from_end_to_end(flags, tmp_path, tiny_pipeline_dir, photos_dir, capsys):
    output = tmp_path / "output"
    before = {path: path.stat().st_mtime_ns for path in (*tiny_pipeline_dir.rglob("*"), *photos_dir.rglob("*"))}
    found = run(flags, seed=5)
    captured = capsys.readouterr()
    parts = {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    files = {"README.md", "metrics.jsonl", "model_index.json", "run.json"}
    assert {path.name for path in output.iterdir()} == parts | files
    assert {path.name for path in (output / "unet").iterdir()} == {"config.json", Path(UNET_FILE).name}
    assert {p: p.stat().st_mtime_ns for p in (*tiny_pipeline_dir.rglob("*"), *photos_dir.rglob("*"))} == before
    change = weight_change(tiny_pipeline_dir, output)
    assert change.abs().max() < 3.1e-3 and (change != 0).double().mean() > 0.9

    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        assert {"step", "loss", "lr", "grad_norm", "loss_scale", "skipped", "step_time"} <= row.keys()
        assert 0 < row["loss"] < 10 and row["grad_norm"] > 0 and row["step_time"] > 0
        assert row["lr"] == pytest.approx(1e-3) and row["loss_scale"] == 1 and row["skipped"] is False
    assert "4 photos at 32 px" in captured.out and str(output) in captured.out.splitlines()[-1]
    assert "3/3" in captured.err and "loss=" in captured.err and "lr=1.0e-03" in captured.err


def test_run_json_says_what_was_run(flags, tmp_path, tiny_pipeline_dir, photos_dir):
    photos = write_photos(tmp_path / "my photos", 2)
    (photos / "notes.txt").write_text("no photo")
    flags |= dict(instance_data_dir=photos, instance_prompt='it\'s "my" cat 🐈', seed=7)
    run(flags)
    record = run_json(tmp_path / "output")
    assert (record["program"], record["status"]) == ("train_dreambooth_colossalai", "complete")
    assert record["seed"] == 7 and record["num_ranks"] == 1 and record["device"].startswith("cpu")
    arguments = vars(parse_args(as_argv(flags)))
    assert record["arguments"].keys() == arguments.keys()
    assert record["arguments"]["instance_prompt"] == flags["instance_prompt"]
    assert record["arguments"]["learning_rate"] == 1e-3 and record["arguments"]["save_dtype"] == "fp32"
    assert record["versions"]["torch"] == metadata.version("torch") and "missing" not in record["versions"].values()
    assert record["photos"] == [
        dict(file=p.name, size=[48, 48], sha256=hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(photos.glob("*.jpg"))
    ]
    assert record["skipped_files"] == [dict(file="notes.txt", reason="not an image")]
    hashes = record["base_model"]["sha256"]
    assert hashes[UNET_FILE] == hashlib.sha256((tiny_pipeline_dir / UNET_FILE).read_bytes()).hexdigest()
    assert {"model_index.json", "vae/config.json", "tokenizer/vocab.json"} <= hashes.keys()
    assert record["result"]["num_steps"] == 3 and record["result"]["num_skipped"] == 0
    command = shlex.split(record["command"])
    assert command[:4] == ["torchrun", "--nproc_per_node", "1", "train_dreambooth_colossalai.py"]
    assert command[4:] == as_argv(flags)


# A change of code that is not meant to change results leaves these numbers as they are, to the last bit.
AT_SEED_0 = dict(  # in hexadecimal, so that nothing is rounded
    loss="0x1.05a89ep+0 0x1.16d8bcp+0 0x1.116660p+0 0x1.e785f6p-1 0x1.1a0f52p+0",
    grad_norm="0x1.651678p+1 0x1.610e38p+1 0x1.641808p+1 0x1.3617dap+1 0x1.3c3082p+1",
)
PINNED_ON = dict(torch="2.13.0", capability="AVX2", processor="AuthenticAMD 25 1", num_threads=1, limits={})


@pytest.mark.skipif(
    f"diffusers=={diffusers.__version__}\n" not in re.sub(" .*", "", (ROOT / "requirements.txt").read_text()),
    reason="other versions of diffusers draw other initial weights; tests/stacks/test_golden.py compares the stacks",
)
def test_the_losses_at_a_fixed_seed_are_pinned(flags):
    found = run(flags, max_train_steps=5, seed=0)
    for name, pinned in AT_SEED_0.items():
        values, expected = [row[name] for row in found], [float.fromhex(value) for value in pinned.split()]
        assert values == pytest.approx(expected, rel=ANOTHER_ORDER[name])
        if what_decides_last_bits() == PINNED_ON:
            assert values == expected


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_gives_nearly_the_losses_of_fp32(flags, tmp_path, tiny_pipeline_dir, mixed_precision):
    expected = losses(run(flags, max_train_steps=2))
    found = run(flags, max_train_steps=2, mixed_precision=mixed_precision, output_dir=tmp_path / "half")
    assert losses(found) == pytest.approx(expected, rel=2e-2)
    assert found[0]["loss_scale"] == (65536 if mixed_precision == "fp16" else 1)
    assert load_file(tmp_path / "half" / UNET_FILE)["conv_in.weight"].dtype == torch.float32
    change, reference = (weight_change(tiny_pipeline_dir, tmp_path / name) for name in ("half", "output"))
    assert torch.nn.functional.cosine_similarity(change, reference, dim=0) > 0.98


def test_an_fp16_base_gives_an_fp16_output(flags, tmp_path):
    base = write_pipeline(tmp_path / "base", dtype=torch.float16)
    run(flags, pretrained_model_name_or_path=base, max_train_steps=1)
    assert load_file(tmp_path / "output" / UNET_FILE)["conv_in.weight"].dtype == torch.float16
    assert run_json(tmp_path / "output")["arguments"]["save_dtype"] == "fp16"


def test_weights_that_are_read_beside_the_imports_train_the_same_and_fail_in_one_line(
    flags, tmp_path, monkeypatch, capsys
):
    """As on a GPU, but for where they are read onto."""
    expected, devices = losses(run(flags)), []

    def read(paths, device):
        devices.append(device)
        return read_onto(paths if len(devices) == 1 else [photo], "cpu")

    photo = next(flags["instance_data_dir"].iterdir())
    monkeypatch.setattr(
        "utils.preflight.sources.make_plan", lambda *a, **b: make_plan(*a, **b)._replace(reads_ahead=True)
    )
    monkeypatch.setattr("train_dreambooth_colossalai.read_onto", read)
    assert losses(run(flags, output_dir=tmp_path / "ahead")) == expected
    assert run_main(main, as_argv(flags | dict(output_dir=tmp_path / "again"))) == 2
    assert devices == 2 * ["cuda:0"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(photo) in line and "is not a file of weights (it is a picture)" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(resolution=33), "--resolution 33 is not divisible by the VAE's factor 4; use 32 or 36\n"),
        (dict(resolution=3), "--resolution 3 is not divisible by the VAE's factor 4; use 4\n"),
        (dict(instance_data_dir="nowhere"), "--instance_data_dir: there is no folder nowhere"),
        (dict(pretrained_model_name_or_path="nowhere"), "--pretrained_model_name_or_path nowhere does not exist"),
        (dict(tokenizer_name="nowhere"), "--tokenizer_name nowhere is not a tokenizer's folder: no tokenizer_config"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, tmp_path, capsys, changes, message):
    assert run_main(main, as_argv(flags | changes)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert not (tmp_path / "output").exists()
    assert not torch.distributed.is_initialized()


def test_the_recipes_command(tmp_path):
    write_512_pixel_pipeline(tmp_path / "model/stable-diffusion-v1-4")
    write_photos(tmp_path / "instance", 4, size=(600, 600))
    argv = [
        "--pretrained_model_name_or_path=./model/stable-diffusion-v1-4",
        "--instance_data_dir=./instance",
        "--output_dir=./output",
        "--instance_prompt=a photo of my cat.",
        "--resolution=512",
        "--train_batch_size=1",
        "--mixed_precision=fp16",
        "--learning_rate=1.0e-6",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        "--max_train_steps=3",
    ]
    result = launch(1, argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("warning", "deprecat", "apex", "tensornvme", "bitsandbytes", "gemm", "traceback", "error"):
        assert word not in (result.stderr + result.stdout).lower(), result.stderr
    found = rows(tmp_path / "output")
    assert len(found) == 3 and all(math.isfinite(loss) for loss in losses(found))
    assert not any(row["skipped"] for row in found)
