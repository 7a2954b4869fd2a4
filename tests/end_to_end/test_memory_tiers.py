"""Whole runs under the memory that smaller cards have: on a GPU under torch's own limit, on a CPU without one."""

import json

import pytest

from bench import memory_tiers
from bench.memory_tiers import ADVICE, TIERS, Tier, missing
from utils.training.memory import MemoryNeeds, memory_needed, out_of_memory_line

SD = 859_520_964


def test_the_estimate_says_which_tiers_fit():
    """Class images double the batch; what a card leaves is its memory without 1.2 GB."""
    assert Tier(6, []).limit == pytest.approx(6 * 2**30 - 1.2e9)
    for tier in TIERS:
        flags = dict(flag.lstrip("-").partition("=")[::2] for flag in tier.flags)
        offload = "all" if "low_memory" in flags else flags.get("offload_optimizer", "none")
        checkpoints = bool({"low_memory", "gradient_checkpointing"} & flags.keys())
        batch, eight_bit = int(flags["train_batch_size"]), "use_8bit_adam" in flags
        needs = MemoryNeeds(SD, 1, False, batch, True, 512, checkpoints, eight_bit, offload)
        assert (memory_needed(needs) <= tier.limit) == tier.fits, tier
        if not tier.fits:
            assert ADVICE.search(f"error: {out_of_memory_line(needs)}")


def test_what_a_run_has_not_left_is_named(tmp_path):
    assert "output/model_index.json" in missing(tmp_path) and len(missing(tmp_path)) == 6
    for number in range(4):
        (tmp_path / "class").mkdir(exist_ok=True)
        (tmp_path / f"class/class-{number}.png").touch()
    assert "class/*.png" not in missing(tmp_path)


@pytest.mark.slow
def test_a_whole_run(tiny_pipeline_dir, photos_dir, tmp_path):
    """The commands and what they leave; there is no limit on a CPU."""
    arguments = [f"--model={tiny_pipeline_dir}", f"--photos={photos_dir}", f"--json={tmp_path / 'runs.json'}"]
    arguments += ["--only", "6", "--resolution=32", "--mixed_precision=no"]
    assert memory_tiers.main(arguments) == 0
    (row,) = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert row["ok"] and row["code"] == row["evaluation_code"] == 0 and row["missing"] == []


@pytest.mark.gpu
@pytest.mark.slow
def test_the_smallest_card_and_one_that_is_too_small(tmp_path):
    assert memory_tiers.main(["--only", "6", "12", f"--json={tmp_path / 'runs.json'}"]) == 0
    rows = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert [row["code"] for row in rows] == [0, 1, 0]
    assert all(row["peak_gb"] <= row["limit_gb"] for row in rows if row["code"] == 0)
