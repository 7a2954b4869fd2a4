"""Numbers that can hardly be meant: said before the run."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.script import UNET_FILE, dry_run, make_args
from utils.errors import UserError
from utils.models.check import check_base_model
from utils.preflight.numbers import check_schedule, describe_launcher, describe_rounding, farthest, share_that_moves
from utils.run.plan import fill_in_defaults, make_plan
from utils.training.learning_rates import learning_rate_table


def plan_of(tmp_path, **values):
    args = make_args(tmp_path, **values)
    args = fill_in_defaults(args, num_photos=4, num_ranks=1, on_gpu=False, save_dtype="fp16", has_bf16=True)
    return make_plan(args, num_parameters=1000, num_ranks=1)


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
    said = check_schedule(plan_of(tmp_path, **values))
    assert (said is None) == (reached is None)
    if reached:
        assert f"reaches {reached} of 0.0001" in said

        assert float(reached) == pytest.approx(max(learning_rate_table(**plan_of(tmp_path, **values).learning_rates)))


def test_a_schedule_that_diffusers_refuses(tmp_path):
    values = dict(lr_scheduler="polynomial", learning_rate=1e-8, max_train_steps=2)
    with pytest.raises(UserError, match="--lr_scheduler polynomial ends at 1e-07: --learning_rate 1e-08"):
        check_schedule(plan_of(tmp_path, **values))


def test_how_far_a_run_can_move_a_weight(tmp_path):
    values = dict(learning_rate=1e-3, max_train_steps=10)
    assert farthest(plan_of(tmp_path, **values)) == pytest.approx(1e-2)
    warm = values | dict(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    assert farthest(plan_of(tmp_path, **warm)) == pytest.approx(1e-3 * (0 + 1 / 4 + 2 / 4 + 3 / 4 + 6))
    assert farthest(plan_of(tmp_path, **warm | dict(lr_warmup_steps=100))) == pytest.approx(1e-3 * 45 / 100)


def test_the_share_of_weights_that_can_move(base):
    """Half of every sample is 1 (spacing 2**-10), half is 2**-10 (spacing 2**-20)."""
    halves = torch.tensor([1.0, 2.0**-10])
    made = {
        name: halves.repeat(value.numel() // 2 + 1)[: value.numel()].reshape(value.shape)
        for name, value in load_file(base / UNET_FILE).items()
    }
    save_file(made, base / UNET_FILE)
    checked = check_base_model(base)
    shares = [share_that_moves(checked, reach) for reach in (2.0**-22, 2.0**-20, 2.0**-13, 2.0**-10)]
    assert shares[0] == 0 and shares[1] == shares[2] == pytest.approx(0.5, abs=0.01) and shares[3] == 1


def test_the_estimate_is_what_rounding_says(base):
    reach, stored = 1e-5, load_file(base / UNET_FILE)
    values = torch.cat([value.flatten() for value in stored.values()]).numpy()
    moved = np.maximum(
        np.abs((values + reach).astype(np.float16) - values.astype(np.float16)) > 0,
        np.abs((values - reach).astype(np.float16) - values.astype(np.float16)) > 0,
    )
    assert share_that_moves(check_base_model(base), reach) == pytest.approx(moved.mean(), abs=0.1)


def test_a_result_in_fp16_that_hardly_changes(tmp_path, base):
    checked = check_base_model(base)
    little = dict(learning_rate=1e-7, max_train_steps=20)
    said = describe_rounding(plan_of(tmp_path, **little), checked)
    assert "saved in fp16, at most " in said and "20 steps move one by 2e-06 at most" in said
    assert describe_rounding(plan_of(tmp_path, **little, save_dtype="fp32"), checked) is None
    assert describe_rounding(plan_of(tmp_path, learning_rate=1e-3, max_train_steps=300), checked) is None


def test_accelerates_precision_is_not_read(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    assert describe_launcher(plan) is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert describe_launcher(plan) is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert describe_launcher(plan).startswith("accelerate's mixed precision (bf16) is not read: the run is in no")


def test_they_are_notes_in_the_table(tmp_path, tiny_pipeline_dir, photos_dir, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags = ["--lr_scheduler=cosine", "--max_train_steps=4", "--save_dtype=fp16", "--learning_rate=1e-6"]
    code, out, _ = dry_run(tiny_pipeline_dir, photos_dir, tmp_path, capsys, *flags)
    notes = [line.split()[1] for line in out.splitlines() if line.startswith("note")]
    assert code == 0 and notes == ["schedule", "save_dtype", "precision"], json.dumps(out)
