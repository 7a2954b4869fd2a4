"""The table of the checks: what it says of photos, prompt, disk and device, and its verdict."""

import os
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.pipelines import write_photos
from tests.helpers.script import ROOT, as_argv, dry_run, run
from utils import preflight_resources
from utils.errors import UserError
from utils.gpu import gpu_is_possible
from utils.preflight import check_base_model
from utils.preflight_photos import describe_prompt, load_quick_tokenizer
from utils.preflight_resources import check_device, check_disk, num_parameters
from utils.preflight_table import Table

EMBEDDED = ROOT / "model/tiny-stable-diffusion"


def rows_of(table: str) -> dict[str, str]:
    """{finding: verdict}."""
    return {line[6:].split("  ", 1)[1].strip(): line[:4].strip() for line in table.splitlines()[1:-1]}


def test_a_dry_run_checks_and_trains_nothing(flags, tmp_path, capsys):
    from train_dreambooth_colossalai import main

    assert main(as_argv(flags | dict(dry_run=True))) == 0
    out = capsys.readouterr().out
    assert out.startswith("preflight\n") and out.splitlines()[-1].startswith("ready to train (")
    assert not (tmp_path / "output").exists() and not torch.distributed.is_initialized()


def test_a_dry_run_lists_every_problem(tmp_path, tiny_pipeline_dir, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "output/mine.txt").write_text("mine")
    options = ("--resolution=33", "--tokenizer_name=nowhere")
    code, out, err = dry_run(tiny_pipeline_dir, tmp_path / "nowhere", tmp_path, capsys, *options)
    assert code == 2 and err == "" and out.splitlines()[-1].startswith("NOT READY: 4 to mend")
    problems = [finding for finding, verdict in rows_of(out).items() if verdict == "STOP"]
    for part in ("--resolution 33", "holds files that", "--instance_data_dir", "--tokenizer_name nowhere"):
        assert sum(part in problem for problem in problems) == 1


def test_a_run_shows_the_table_first(flags, capsys):
    run(flags, max_train_steps=1)
    out = capsys.readouterr().out
    assert out.index("ready to train") < out.index("4 photos at 32 px")


def test_what_is_said_of_photos(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    (photos / "again.jpg").write_bytes((photos / "photo-0.jpg").read_bytes())
    Image.open(photos / "photo-0.jpg").resize((60, 60)).save(photos / "nearly.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 50, 4), np.uint8))
    noise.convert("RGB").save(photos / "turned.jpg", exif=exif)
    noise.save(photos / "see-through.png")
    noise.convert("CMYK").resize((16, 16)).save(photos / "small.jpg")
    (photos / "notes.txt").write_text("no photo")
    (photos / ".DS_Store").write_text("")
    code, out, _ = dry_run(tiny_pipeline_dir, photos, tmp_path, capsys)
    rows = rows_of(out)
    assert code == 0
    assert rows["photo-0.jpg: JPEG 48x48"] == "ok"
    assert rows["turned.jpg: JPEG 40x50, turned upright (EXIF 6)"] == "ok"
    assert rows["see-through.png: PNG 50x40, transparency on white"] == "ok"
    assert rows["small.jpg: JPEG 16x16, CMYK made RGB, enlarged 2.0 times, it will look soft"] == "note"
    assert rows["'photo-0.jpg' is 'again.jpg' again"] == "note"
    assert rows["'nearly.png' is nearly 'again.jpg'"] == "note"
    assert rows["notes.txt: not an image"] == "note" and rows[".DS_Store: hidden"] == "ok"
    assert not any("turned" in row and "nearly" in row for row in rows)


PROMPTS = ["a photo of my cat.", "A  sks's DOG\n42!", "кот 🐈 naïve", "", "x" * 30, "<|endoftext|> don't", "a_b-c/d"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_quick_tokenizer_is_that_of_transformers(prompt, tiny_pipeline_dir):
    from utils.models import load_tokenizer

    for folder in (EMBEDDED, tiny_pipeline_dir):
        expected = load_tokenizer(folder)(prompt, add_special_tokens=False).input_ids
        assert load_quick_tokenizer(folder / "tokenizer").encode(prompt, add_special_tokens=False).ids == expected


def test_how_a_prompt_is_split():
    finding, verdict = describe_prompt("a photo of sks cat", EMBEDDED / "tokenizer")
    assert finding == "7 tokens: a| photo| of| sks| cat|" and verdict == "ok"


def test_the_tail_of_a_long_prompt_is_named():
    words = "a photo of " + "cat " * 72
    assert describe_prompt(words, EMBEDDED / "tokenizer")[1] == "ok"
    finding, verdict = describe_prompt(words + "in the rain", EMBEDDED / "tokenizer")
    assert finding == "80 tokens, but 77 are read; cut off: 'in the rain'" and verdict == "note"


def make_args(tmp_path, **values) -> Namespace:
    options = dict(save_dtype="fp32", output_dir=tmp_path / "a/b", max_train_steps=1000, checkpointing_steps=100)
    options |= dict(checkpoints_total_limit=None, train_batch_size=1, resolution=512, mixed_precision="fp16")
    options |= dict(gradient_checkpointing=False, low_memory=False, use_8bit_adam=False, offload_optimizer="none")
    return Namespace(**options | dict(with_prior_preservation=False) | values)


def test_the_disk_space_that_is_asked_for(tmp_path, tiny_pipeline_dir, monkeypatch):
    base = check_base_model(tiny_pipeline_dir)
    count = sum(value.numel() for value in load_file(base.unet_weights[0]).values())
    assert num_parameters(base) == count
    free = {}
    monkeypatch.setattr(preflight_resources.shutil, "disk_usage", lambda path: Namespace(free=free["bytes"]))
    for limit, most, first in ((None, 10, 0), (2, 3, 0), (None, 5, 500)):
        args = make_args(tmp_path, checkpoints_total_limit=limit)
        needed = count * 4 + most * count * 12
        free["bytes"] = needed - 1
        with pytest.raises(UserError, match=r"too little disk space \(.* for the result, .* free\); .*_total_limit"):
            check_disk(args, base, first)
        free["bytes"] = needed
        assert check_disk(args, base, first)[1] == "note"
        free["bytes"] = needed + count * 12
        assert check_disk(args, base, first)[1] == "ok"


def test_what_is_written_is_what_was_said(flags, tmp_path, tiny_pipeline_dir):
    base = check_base_model(tiny_pipeline_dir)
    for save_dtype, each in (("fp32", 12), ("fp16", 14)):
        output = tmp_path / save_dtype
        run(flags, max_train_steps=1, checkpointing_steps=1, save_dtype=save_dtype, output_dir=output)
        written = sum(path.stat().st_size for path in (output / "checkpoint-1").rglob("*") if path.is_file())
        assert written == pytest.approx(num_parameters(base) * each, rel=0.2)  # headers weigh in a model so small


def fake_cuda(monkeypatch, free: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (int(free), int(free)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "A GPU")


def test_the_gpu(tmp_path, tiny_pipeline_dir, monkeypatch):
    base = check_base_model(tiny_pipeline_dir)
    fake_cuda(monkeypatch, 8e9)
    assert check_device(make_args(tmp_path), base)[1] == "ok"
    finding, verdict = check_device(make_args(tmp_path, train_batch_size=16), base)
    assert verdict == "note" and "it fits with --gradient_checkpointing (about 4.3 GB)" in finding
    finding, verdict = check_device(make_args(tmp_path, resolution=4096), base)
    assert verdict == "note" and "it may not fit; try a smaller --resolution" in finding
    args = make_args(tmp_path, low_memory=True, gradient_checkpointing=True, offload_optimizer="moments")
    finding, verdict = check_device(args, base)
    assert verdict == "ok" and "(--low_memory: --gradient_checkpointing --offload_optimizer moments)" in finding
    monkeypatch.setattr(preflight_resources, "free_host_memory", lambda: 1e3)
    finding, verdict = check_device(args, base)
    assert verdict == "note" and "--use_8bit_adam or another --offload_optimizer takes less" in finding
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--nproc_per_node 2, but torch sees 1 GPUs"):
        check_device(make_args(tmp_path), base)


@pytest.mark.parametrize(("hidden", "verdict"), [(None, "note"), ("", "ok")])
def test_a_gpu_that_torch_cannot_use_is_said_loudly(tmp_path, tiny_pipeline_dir, monkeypatch, hidden, verdict):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight_resources.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding, found = check_device(make_args(tmp_path), check_base_model(tiny_pipeline_dir))
    assert found == verdict and ("TORCH CANNOT USE IT" in finding) == (verdict == "note")


def test_a_table_cannot_be_written_into_by_a_name():
    table = Table(collects=True)
    table.add("photo", "a\nSTOP\x1b[31m 🐈")
    assert str(table).count("\n") == 2 and "\x1b" not in str(table) and "🐈" in str(table)


def test_the_preflight_of_the_embedded_model_is_quick(tmp_path):
    argv = ["--pretrained_model_name_or_path", EMBEDDED, "--instance_data_dir", ROOT / "instance", "--dry_run"]
    argv += ["--instance_prompt", "a photo of my cat.", "--output_dir", tmp_path / "output", "--resolution", "64"]
    command = [sys.executable, "train_dreambooth_colossalai.py", *map(str, argv)]
    seconds = []
    for _ in range(2):
        before = os.times()
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(min(spent, time.perf_counter() - started))
    assert min(seconds) < 1.5


@pytest.mark.skipif(gpu_is_possible(), reason="where a GPU may be, torch is asked about it")
def test_the_preflight_needs_no_torch(tmp_path, tiny_pipeline_dir, photos_dir):
    argv = as_argv(dict(pretrained_model_name_or_path=tiny_pipeline_dir, instance_data_dir=photos_dir, dry_run=True))
    argv += ["--instance_prompt=my cat", f"--output_dir={tmp_path / 'output'}", "--resolution=32"]
    program = (
        "import sys; from train_dreambooth_colossalai import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 False", result.stderr
    assert "no GPU: training on the CPU" in result.stdout
