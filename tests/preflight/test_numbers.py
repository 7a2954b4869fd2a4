"""Numbers that can hardly be meant: said before the run."""

import json

import pytest
import torch

from tests.helpers.script import dry_run, make_args
from utils.errors import UserError
from utils.preflight.resources import check_schedule, describe_launcher, describe_rounding
from utils.run.plan import make_plan
from utils.training.learning_rates import learning_rate_table


def plan_of(tmp_path, **values):
    counts = dict(num_parameters=1000, num_photos=4, num_ranks=1, on_gpu=False, save_dtype="fp16")
    return make_plan(make_args(tmp_path, **values), **counts)


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


def test_a_result_in_fp16_that_hardly_changes(tmp_path):
    little = dict(learning_rate=1e-7, max_train_steps=20)
    said = describe_rounding(plan_of(tmp_path, **little))
    assert said.startswith("20 steps move a weight by 2e-06 at most: saved in fp16, those above 0.008 stay what they")
    assert describe_rounding(plan_of(tmp_path, **little, save_dtype="fp32")) is None
    assert describe_rounding(plan_of(tmp_path, learning_rate=1e-3, max_train_steps=300)) is None
    weights = torch.tensor([0.0082, 0.1, 1.0]).half().float()  # above 2e-6 x 2**12
    assert ((weights + 2e-6).half() == weights).all() and ((weights - 1.9e-6).half() == weights).all()
    assert (torch.tensor([0.004]).half().float() + 2e-6).half() != torch.tensor([0.004]).half()


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
