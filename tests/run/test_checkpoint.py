"""What a checkpoint holds, and which folders are none."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import edit_json
from tests.helpers.script import LATEST, UNET_FILE, as_argv, bits, run
from train_dreambooth_colossalai import main
from utils.errors import UserError
from utils.files.hashing import sha256_of
from utils.models import loading
from utils.models.folder import read_base
from utils.run.checkpoint import Checkpointer, restore
from utils.run.lineage import Lineage, list_checkpoints, read_checkpoint
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer


def test_diffusers_loads_a_checkpoint(flags, output):
    run(flags, max_train_steps=4, checkpointing_steps=2)
    unet, info = UNet2DConditionModel.from_pretrained(
        output, subfolder="checkpoint-4/unet", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()) and unet.dtype == torch.float32
    final = load_file(output / UNET_FILE)
    assert all(torch.equal(value, final[name]) for name, value in unet.state_dict().items())
    stored = load_file(output / "checkpoint-4/training_state.safetensors")
    assert stored.keys() == {f"{kind}.{name}" for name in final for kind in ("exp_avg", "exp_avg_sq")}


def test_what_a_checkpoint_of_half_precision_holds(flags, tmp_path):
    run(flags, max_train_steps=2, checkpointing_steps=2, mixed_precision="fp16", save_dtype="fp16")
    folder = tmp_path / "output/checkpoint-2"
    unet, stored = load_file(folder / UNET_FILE), load_file(folder / "training_state.safetensors")
    for name, value in unet.items():
        assert value.dtype == torch.float16 and torch.equal(value, stored[f"master.{name}"].half())
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["optimizer"]["loss_scale"], state["optimizer"]["num_applied"]) == (2, 65536.0, 2)
    assert state["determines"]["photos"].keys() == {f"photo-{number}.jpg" for number in range(4)}
    assert "unet/config.json" in state["determines"]["base_model"] and state["arguments"]["seed"] == 0


def test_the_newest_are_kept(flags, tmp_path):
    run(flags, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert [found.step for found in list_checkpoints(tmp_path / "output")] == [3, 4]


def test_a_foreign_folder_named_like_a_checkpoint_survives(flags, output, capsys):
    run(flags, checkpointing_steps=1, checkpoints_total_limit=1)
    for name in ("checkpoint-1", "checkpoint-5"):
        (output / name).mkdir()
        (output / name / "thesis.txt").write_text("mine")
    changes = dict(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=6)
    assert main(as_argv(flags | LATEST | changes)) == 0
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5", "checkpoint-6"}
    assert (output / "checkpoint-5/thesis.txt").read_text() == "mine"
    assert "checkpoint-5 exists and is not this program's" in capsys.readouterr().err


DAMAGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "other bytes": lambda file: file.write_bytes(file.read_bytes()[:-100] + bytes(100)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [UNET_FILE, "training_state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_not_resumed_from(flags, output, capsys, name, damage):
    """By its name; `latest` is the whole one before."""
    run(flags, max_train_steps=4, checkpointing_steps=2)
    whole = bits(output)
    DAMAGES[damage](output / "checkpoint-4" / name)
    with pytest.raises(UserError, match=r"checkpoint-4.*(checkpoint-2 is whole|there are: checkpoint-2)$"):
        main(as_argv(flags | dict(resume_from_checkpoint="checkpoint-4", max_train_steps=4)))
    run(flags, **LATEST, max_train_steps=4)
    said = capsys.readouterr()
    assert f"passed over: {output / 'checkpoint-4'}" in said.out and "resuming from" in said.err
    assert bits(output) == whole


def test_latest_is_never_what_is_no_checkpoint_of_the_run(flags, output, tmp_path, capsys):
    run(flags, checkpointing_steps=1, output_dir=tmp_path / "other")
    run(flags, checkpointing_steps=2)
    shutil.copytree(tmp_path / "other/checkpoint-3", output / "checkpoint-3")  # another run's
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-02")
    (output / "checkpoint-4").mkdir()
    assert [found.path.name for found in list_checkpoints(output)] == ["checkpoint-2", "checkpoint-3"]
    run(flags, **LATEST)
    said = capsys.readouterr()
    assert f"resuming from {output / 'checkpoint-2'}" in said.err
    assert re.findall("passed over: .*(checkpoint-.) is no whole checkpoint", said.out) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_all_are_damaged(flags, output):
    run(flags, checkpointing_steps=2)
    DAMAGES["other bytes"](output / "checkpoint-2" / UNET_FILE)
    with pytest.raises(UserError, match="no checkpoint in .* is whole: .*model.safetensors is damaged"):
        main(as_argv(flags | LATEST))


@pytest.mark.parametrize("file", [UNET_FILE, "training_state.safetensors"])
def test_what_is_not_finite_is_not_resumed_from(flags, output, file):
    run(flags, checkpointing_steps=2)
    path = output / "checkpoint-2" / file
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path)
    state = output / "checkpoint-2/state.json"
    edit_json(state, sha256=json.loads(state.read_text())["sha256"] | {file: sha256_of(path)})
    with pytest.raises(UserError, match="is not finite; resume from an earlier checkpoint"):
        main(as_argv(flags | LATEST | dict(max_train_steps=4)))


def make_optimizer(folder, precision: str, memory_format):
    flat = FlatParameters(loading.load_unet(read_base(folder)), loading.WEIGHT_DTYPES[precision], "cpu", memory_format)
    return MasterWeightsOptimizer(flat, learning_rates=[1e-3])


def updated(optimizer):
    optimizer.flat.grad.copy_(torch.randn(optimizer.flat.grad.shape, generator=torch.Generator().manual_seed(0)))
    optimizer.step()
    return optimizer


SAVING = dict(unet_config=b"{}", describe=dict, save_dtype="fp32", total_limit=None, say=print)


@pytest.mark.parametrize(("precision", "scale", "num_good"), [("no", 1.0, 0), ("fp16", 2.0**-9, 3)])
def test_another_memory_layout_gives_the_same_state(tmp_path, tiny_pipeline_dir, precision, scale, num_good):
    one = updated(make_optimizer(tiny_pipeline_dir, precision, torch.channels_last))
    other = make_optimizer(tiny_pipeline_dir, precision, torch.contiguous_format)
    counters = dict(loss_scale=scale, num_good=num_good, num_applied=1, num_skipped=2)
    for name, value in counters.items():
        getattr(one, name).fill_(value)
    described = SAVING | dict(describe=lambda: dict(determines=dict(arguments=dict(mixed_precision=precision))))
    Checkpointer(tmp_path, one, lineage=Lineage("x", []), **described).save_and_wait(7)
    places = {name: getattr(other, name).data_ptr() for name in ("exp_avg", "loss_scale", "num_good")}
    restore(read_checkpoint(tmp_path / "checkpoint-7"), other)
    assert places == {name: getattr(other, name).data_ptr() for name in places}
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (dict(each.flat.named(getattr(each, name))) for each in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) and any(value.any() for value in ours.values())
    for values in (lambda flat: flat.named(flat.weight), FlatParameters.named_masters):
        ours, theirs = (dict(values(each.flat)) for each in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {name: getattr(other, name).item() for name in counters} == counters


def test_bf16_weights_are_rounded_as_in_the_run(tmp_path, tiny_pipeline_dir):
    """Which neighbour a weight becomes follows from the number of updates: a resumed run has the same bits."""
    one, other = (make_optimizer(tiny_pipeline_dir, "bf16", torch.contiguous_format) for _ in range(2))
    first = one.flat.weight.clone()
    updated(one)
    Checkpointer(tmp_path, one, lineage=Lineage("x", []), **SAVING).save_and_wait(1)
    assert (one.flat.weight != first).float().mean() > 0.2  # a new choice for all, not only a step for some
    restore(read_checkpoint(tmp_path / "checkpoint-1"), other)
    assert torch.equal(other.flat.weight, one.flat.weight)
    assert torch.equal(other.flat.masters.remainder, one.flat.masters.remainder)


@pytest.mark.parametrize(
    ("before", "after", "scale"), [("no", "fp16", 2**16), ("bf16", "fp16", 2**16), ("fp16", "no", 1)]
)
def test_another_precision_has_a_loss_scale_of_its_own(flags, before, after, scale):
    run(flags, mixed_precision=before, max_train_steps=1, checkpointing_steps=1)
    found = run(flags | LATEST, mixed_precision=after, max_train_steps=2, allow_changes=True)
    assert found[1]["loss_scale"] == scale
