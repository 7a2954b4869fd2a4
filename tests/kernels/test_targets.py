"""Every kernel compiles for every architecture of GPU that the documentation names, and fits it; no GPU is needed."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from bench.kernel_targets import SHARED_MEMORY, TRITON_FOLDER, Variant, problems
from tests.helpers.script import ROOT

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and not TRITON_FOLDER.exists(), reason="needs Triton, in the environment or beside it"
)


def compile_for(tmp_path, *arguments: str, **environment: str) -> list[dict]:
    """The rows of the bench, in a process of its own: Triton is not on this one's path."""
    command = [sys.executable, "-m", "bench.kernel_targets", f"--json={tmp_path / 'rows.json'}", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["problems"] for row in rows] == [[] for _ in rows], result.stdout
    assert result.returncode == 0 and result.stdout.count("| ok |") == len(rows), result.stderr
    return rows


@needs_triton
def test_a_small_network_for_the_recipes_own_card(tmp_path):
    """sm_86: an RTX 3090. Triton is on the path at once: the bench need not start itself anew."""
    (row,) = compile_for(tmp_path, "--small", "--targets", "86", "--dtypes", "fp16", PYTHONPATH=str(TRITON_FOLDER))
    kernels = {variant["kernel"] for variant in row["variants"]}
    assert {"_moments", "_normalise", "_geglu_backward", "_sum_forward", "_adamw_scattered", "root_of_sum"} <= kernels
    assert all(8 <= variant["registers"] <= 255 and variant["spilled"] == 0 for variant in row["variants"])


@needs_triton
@pytest.mark.slow
def test_all_kernels_for_all_targets(tmp_path):
    rows = compile_for(tmp_path)
    assert {row["target"] for row in rows} == SHARED_MEMORY.keys() and len(rows) == 3 * len(SHARED_MEMORY)
    assert all(len(row["variants"]) > 50 for row in rows)


@needs_triton
def test_a_triton_that_cannot_build_on_a_gpu_is_none():
    code = "import importlib, os, torch; torch.cuda.is_available = lambda: True; from utils.kernels import operations"
    code += "; print(operations.HAS_TRITON); os.environ['CC'] = 'no-such-compiler'"
    code += "; print(importlib.reload(operations).HAS_TRITON)"
    env = os.environ | dict(CC=sys.executable, PYTHONPATH=str(TRITON_FOLDER))
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.stdout.split() == ["True", "False"]


def test_what_does_not_fit_is_named():
    fits = Variant("_adamw", 4, 40, 0, 4096)
    assert problems(75, [fits]) == [] and problems(75, []) == ["nothing was compiled"]
    assert "100000 bytes of shared memory, 65536 there" in problems(75, [fits._replace(shared=100_000)])[0]
    assert problems(90, [fits._replace(shared=100_000)]) == []
    assert "255 registers in 16 warps" in problems(90, [fits._replace(num_warps=16, registers=255)])[0]


def test_every_target_has_a_row_in_the_documentation():
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert {int(found) for found in re.findall(r"^\| sm_(\d+) \|", text, re.MULTILINE)} == SHARED_MEMORY.keys()
