"""Disk space, the GPU and its memory, before a run needs them; numbers that can hardly be meant."""

import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import write_index, write_shards
from tests.helpers.script import UNET_FILE, dry_run, make_args, run
from utils.errors import TryAgain, UserError
from utils.models.check import check_base_model
from utils.models.folder import FROZEN_PARTS, read_base
from utils.models.single_file import export_single_file
from utils.preflight import resources
from utils.run.plan import make_plan
from utils.training.build import learning_rate_table
from utils.training.memory import MemoryNeeds


def make_needs(num_parameters: int, **values) -> MemoryNeeds:
    """Of a run in fp16 at 512 px, batch 1."""
    needs = dict(fp32=False, train_batch_size=1, resolution=512, num_ranks=1, with_prior_preservation=False)
    needs |= dict(gradient_checkpointing=False, use_8bit_adam=False, offload_optimizer="none")
    return MemoryNeeds(num_parameters=num_parameters, **needs | values)


def test_the_disk_space_that_is_asked_for(tmp_path, tiny_pipeline_dir, monkeypatch):
    base = check_base_model(tiny_pipeline_dir)
    count = sum(value.numel() for value in load_file(base.folder / UNET_FILE).values())
    assert base.num_parameters == count
    others = [path for path in tiny_pipeline_dir.rglob("*") if path.is_file() and path.parent.name != "unet"]
    copied = sum(path.stat().st_size for path in others if path.parent != tiny_pipeline_dir)
    free = {}
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Namespace(total=1, free=free["bytes"]))
    for limit, most, first in ((None, 10, 0), (2, 3, 0), (None, 5, 500)):
        steps = dict(max_train_steps=1000, checkpointing_steps=100)
        steps |= dict(checkpoints_total_limit=limit) if limit else {}
        plan = plan_of(tmp_path, **steps, save_dtype="fp32", output_dir=tmp_path / "a/b")
        needed = count * 4 + copied + most * count * 12
        free["bytes"] = needed - 1
        with pytest.raises(UserError, match=r"too little disk space \(.* for the result, .* free\); .*_total_limit"):
            resources.check_disk(plan, base, first)
        free["bytes"] = needed
        assert resources.check_disk(plan, base, first)[1] == "note"
        free["bytes"] = needed + count * 12
        assert resources.check_disk(plan, base, first)[1] == "ok"


def test_a_single_file_counts(tmp_path, tiny_pipeline_dir, monkeypatch):
    base, path = check_base_model(tiny_pipeline_dir), tmp_path / "one.safetensors"
    export_single_file(read_base(tiny_pipeline_dir), path)
    tensors = sum(value.nbytes for value in load_file(path).values())
    plan = plan_of(tmp_path, max_train_steps=1, save_dtype="fp32", export_single_file=path)
    copied = [path for part in FROZEN_PARTS for path in base.files(part).values()]
    without = base.num_parameters * 4 + sum(path.stat().st_size for path in copied)
    free = {"bytes": without + tensors}
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Namespace(total=1, free=free["bytes"]))
    with pytest.raises(TryAgain, match="too little disk space"):
        resources.check_disk(plan, base, 0)
    free["bytes"] = without + int(tensors * 1.3)  # the headers of files so small
    resources.check_disk(plan, base, 0)
    monkeypatch.setattr(resources, "_same_device", lambda one, other: one != path.parent)
    free["bytes"] = tensors - 1
    with pytest.raises(UserError, match="--export_single_file takes .* GB free"):
        resources.check_disk(plan, base, 0)


@pytest.mark.parametrize("stored", ["bin", "fp16 variant", "shards"])
def test_parameters_are_the_whole_models_however_it_is_stored(base, stored):
    count = check_base_model(base).num_parameters
    file = base / UNET_FILE
    half = {name: value.half() for name, value in load_file(file).items()}
    if stored == "bin":
        torch.save(half, file.with_suffix(".bin"))
    elif stored == "fp16 variant":
        save_file(half, file.with_suffix(".fp16.safetensors"))
    else:
        write_shards(base), write_index(base)
    file.unlink(missing_ok=True)
    assert check_base_model(base).num_parameters == count


def test_a_disk_that_does_not_say_how_large_it_is(tmp_path, tiny_pipeline_dir, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Namespace(total=0, free=0))
    finding, verdict = resources.check_disk(
        plan_of(tmp_path, max_train_steps=1), check_base_model(tiny_pipeline_dir), 0
    )
    assert verdict == "note" and finding.endswith("the disk does not say how much is free")


def test_what_is_written_is_what_was_said(flags, tmp_path, tiny_pipeline_dir):
    base = check_base_model(tiny_pipeline_dir)
    for save_dtype, each in (("fp32", 12), ("fp16", 14)):
        output = tmp_path / save_dtype
        run(flags, max_train_steps=1, checkpointing_steps=1, save_dtype=save_dtype, output_dir=output)
        written = sum(path.stat().st_size for path in (output / "checkpoint-1").rglob("*") if path.is_file())
        assert written == pytest.approx(base.num_parameters * each, rel=0.2)  # headers weigh in a model so small


def test_the_gpu(tmp_path, tiny_pipeline_dir, monkeypatch):
    count = check_base_model(tiny_pipeline_dir).num_parameters
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (8_000_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "A GPU")
    assert resources.check_device(make_needs(count), low_memory=False)[1] == "ok"
    finding, verdict = resources.check_device(make_needs(count, train_batch_size=16), low_memory=False)
    assert verdict == "note" and "it fits with --gradient_checkpointing (about 4.3 GB)" in finding
    finding, verdict = resources.check_device(make_needs(count, resolution=4096), low_memory=False)
    assert verdict == "note" and "it may not fit; try a smaller --resolution" in finding
    needs = make_needs(count, gradient_checkpointing=True, offload_optimizer="moments")
    with monkeypatch.context() as without_triton:
        without_triton.setattr("utils.training.packed.HAS_TRITON", False)
        with pytest.raises(UserError, match="--low_memory: offloading on a GPU needs Triton .* which is not here"):
            resources.check_device(needs, low_memory=True)
    monkeypatch.setattr("utils.training.packed.host_memory_problem", lambda device: None)
    finding, verdict = resources.check_device(needs, low_memory=True)
    assert verdict == "ok" and "(--low_memory: --gradient_checkpointing --offload_optimizer moments)" in finding
    monkeypatch.setattr(resources.memory, "free_host_memory", lambda: 1e3)
    finding, verdict = resources.check_device(needs, low_memory=True)
    assert verdict == "note" and "--use_8bit_adam or another --offload_optimizer takes less" in finding
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="here").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--nproc_per_node 2, but torch sees 1 GPUs"):
        resources.check_device(make_needs(count), low_memory=False)


@pytest.mark.parametrize(("hidden", "verdict"), [(None, "note"), ("", "ok")])
def test_a_gpu_that_torch_cannot_use_is_a_note(tmp_path, tiny_pipeline_dir, monkeypatch, hidden, verdict):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resources.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding, found = resources.check_device(make_needs(7_000_000), low_memory=False)
    assert found == verdict and ("which takes hours: there is an NVIDIA GPU" in finding) == (verdict == "note")


def test_a_checkpoint_needs_the_hosts_memory_too(monkeypatch):
    """A GPU of 16 GB in a machine with 12.7 GB of memory: the copy of Stable Diffusion's state takes 10.3 GB."""
    needs = make_needs(859_520_964)
    for free, verdict in ((8e9, "note"), (10.2e9, "note"), (11e9, "ok")):
        monkeypatch.setattr(resources.memory, "free_host_memory", lambda free=free: free)
        finding, found = resources._compare_memory(needs, False, "Tesla T4", 15.6e9)
        assert found == verdict and ("a checkpoint's copy takes 10.3 GB" in finding) == (verdict == "note")


COUNTS = dict(num_parameters=1000, num_photos=4, num_ranks=1, on_gpu=False, save_dtype="fp16")


def plan_of(tmp_path, **values):
    return make_plan(make_args(tmp_path, **values), **COUNTS)


@pytest.mark.parametrize(
    ("scheduler", "warmup", "steps", "reached"),
    [
        ("cosine", 500, 4, "6e-07"),
        ("constant_with_warmup", 4, 4, "7.5e-05"),
        ("constant_with_warmup", 3, 4, None),
        ("constant", 500, 4, None),
        ("polynomial", 0, 4, None),
    ],
)
def test_a_warm_up_longer_than_the_run(tmp_path, scheduler, warmup, steps, reached):
    values = dict(lr_scheduler=scheduler, lr_warmup_steps=warmup, max_train_steps=steps, learning_rate=1e-4)
    said = resources.check_schedule(plan_of(tmp_path, **values))
    assert (said is None) == (reached is None)
    if reached:
        assert f"reaches {reached} of 0.0001" in said
        assert float(reached) == pytest.approx(max(learning_rate_table(**plan_of(tmp_path, **values).learning_rates)))


def test_a_schedule_that_diffusers_refuses(tmp_path):
    values = dict(lr_scheduler="polynomial", learning_rate=1e-8, max_train_steps=2)
    with pytest.raises(UserError, match="--lr_scheduler polynomial ends at 1e-07: --learning_rate 1e-08"):
        resources.check_schedule(plan_of(tmp_path, **values))


def test_a_result_in_fp16_that_hardly_changes(tmp_path):
    little = dict(learning_rate=1e-7, max_train_steps=20)
    said = resources.describe_rounding(plan_of(tmp_path, **little))
    assert said.startswith("20 steps move a weight by 2e-06 at most: saved in fp16, those above 0.008 stay what they")
    assert resources.describe_rounding(plan_of(tmp_path, **little, save_dtype="fp32")) is None
    assert resources.describe_rounding(plan_of(tmp_path, learning_rate=1e-3, max_train_steps=300)) is None
    weights = torch.tensor([0.0082, 0.1, 1.0]).half().float()  # above 2e-6 x 2**12
    assert ((weights + 2e-6).half() == weights).all() and ((weights - 1.9e-6).half() == weights).all()
    assert (torch.tensor([0.004]).half().float() + 2e-6).half() != torch.tensor([0.004]).half()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(lr_warmup_steps=10), ["--lr_warmup_steps: no effect with --lr_scheduler constant (not "]),
        (dict(lr_warmup_steps=10, lr_scheduler="linear", max_train_steps=100), []),
        (dict(lr_warmup_steps=0), []),
        (dict(lr_num_cycles=3, lr_power=2.0), ["--lr_num_cycles: no effect but", "--lr_power: no effect but"]),
        (dict(num_class_images=50, prior_loss_weight=0.5), ["--prior_loss_weight, --num_class_images: no effect wit"]),
        (dict(validation_guidance_scale=3.0), ["--validation_guidance_scale: no effect without --validation_prompt"]),
        (dict(validation_prompt="x", validation_steps=100), ["--validation_steps: no effect beyond the last step"]),
        (dict(checkpoints_total_limit=2), ["--checkpoints_total_limit: no effect in a run without a checkpoint"]),
        (dict(num_train_epochs=5, max_train_steps=5), ["--num_train_epochs: no effect beside --max_train_steps"]),
        (dict(logging_dir="here"), ["--logging_dir: no effect without --report_to tensorboard"]),
        (dict(learning_rate=5e6), ["--learning_rate: 5e+06 is not in 1e-08 to 0.001; is it meant?"]),
        (dict(learning_rate=5e-16), ["--learning_rate: 5e-16 is not in"]),
        (dict(learning_rate=1e-3), []),
        (dict(noise_offset=5.0, snr_gamma=0.05), ["--snr_gamma: 0.05 is not in 1 to 20", "--noise_offset: 5 is not"]),
        (dict(adam_beta1=0.999, adam_beta2=0.9), ["--adam_beta1: 0.999 is not in 0.5 to 0.99; is it meant?"]),
        (dict(adam_beta2=0), ["--adam_beta2: 0 is not in"]),
        (dict(max_grad_norm=0, adam_weight_decay=0), []),
        (dict(max_train_steps=80_000, train_batch_size=1), ["the times that a photo is shown: 20000 is not in"]),
        (dict(gradient_accumulation_steps=400), ["batch size x accumulation x ranks: 1600 is not in 1 to 256"]),
    ],
)
def test_flags_without_effect_and_numbers_that_can_hardly_be_meant(tmp_path, given, said):
    found = list(resources.describe_flags(plan_of(tmp_path, **given), 4))
    assert len(found) == len(said) and all(map(str.startswith, found, said)), found


def test_a_rate_is_judged_as_it_is_scaled(tmp_path):
    args = make_args(tmp_path, learning_rate=5e-4)
    for args.scale_lr, batch, said in (
        (True, 4, "--learning_rate: 0.002 is"),
        (True, 1, "--scale_lr: no effect on steps"),
    ):
        args.train_batch_size = batch
        (found,) = resources.describe_flags(make_plan(args, **COUNTS), 4)
        assert found.startswith(said)


def test_they_are_notes_in_the_table(tmp_path, tiny_pipeline_dir, photos_dir, capsys):
    flags = ["--lr_scheduler=cosine", "--max_train_steps=4", "--save_dtype=fp16", "--learning_rate=1e-6"]
    code, out, _ = dry_run(tiny_pipeline_dir, photos_dir, tmp_path, capsys, *flags)
    notes = [line.split()[1] for line in out.splitlines() if line.startswith("note")]
    assert code == 0 and notes == ["schedule", "save_dtype"], json.dumps(out)
