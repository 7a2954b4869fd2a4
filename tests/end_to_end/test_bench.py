"""The benchmarks run on the embedded model on a CPU, so that what they print on a GPU is not their first run."""

import argparse
import importlib
import inspect
import json
import os
import time

import pytest

from bench import evaluate as bench
from bench import loss_curves, start, train_step
from bench.timing import median_ms
from tests.helpers.script import EMBEDDED, ROOT

BENCH = [path for path in (ROOT / "bench").rglob("*.py") if path.stem != "__init__"]


@pytest.mark.parametrize("name", sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in BENCH))
def test_a_benchmark_starts_and_says_what_it_does(name, capsys, monkeypatch):
    module, parsers = importlib.import_module(name), []
    print_help = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: (parsers.append(self), print_help(self)))
    if "main" in vars(module) and inspect.signature(module.main).parameters:
        with pytest.raises(SystemExit) as end:
            module.main(["--help"])
        said = capsys.readouterr().out
        assert end.value.code == 0 and said.startswith(f"usage: python -m {name} ")
        assert module.__doc__.splitlines()[0] in " ".join(said.split()) and "default: SUPPRESS" not in said
        assert [action.dest for action in parsers[0]._actions if not action.help] == []


@pytest.mark.slow
def test_train_step(tmp_path, capsys):
    file = tmp_path / "results.json"
    train_step.main(["--batch_sizes", "1", "--steps", "4", "--json", str(file)])
    results = json.loads(file.read_text())
    (ours,), (reference,) = results["ours"], results["reference"]
    assert len(ours["losses"]) == 4 and 0 < ours["ms_a_step"] < 1e3 * ours["prompt_back"]
    assert ours["first_step"] < ours["prompt_back"]
    assert reference["ms_a_step"] > 0
    said = capsys.readouterr().out
    assert "ours      batch 1:" in said and "reference batch 1:" in said and "floor" in said


@pytest.mark.slow
def test_the_reference_loop_learns_what_the_script_learns(capsys):
    losses = loss_curves.main([f"--model={EMBEDDED}", "--steps=6"])
    assert list(losses) == ["graph", "eager", "reference"]
    for ours, eager, reference in zip(*losses.values(), strict=True):
        assert ours == eager
        assert abs(ours / reference - 1) < 1e-4
    assert len(set(losses["reference"])) == 6
    assert "graph: differs from the reference's loss by" in capsys.readouterr().out


@pytest.mark.slow
def test_sampling_is_timed_and_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", bench.torch.device("cpu"))
    monkeypatch.setattr(bench, "IS_GPU", False)
    file = tmp_path / "bench.json"
    results = bench.main([f"--model={EMBEDDED}", "--quick", "--steps=1", "--batch_sizes", "1", "2", f"--json={file}"])
    assert [(row["name"], row["batch_size"]) for row in results["rows"]] == [
        ("recipe's loop, fp32", 1),
        ("evaluate.py's sampling", 1),
        ("evaluate.py's sampling", 2),
    ]
    assert all(row["seconds_an_image"] > 0 and row["first_call_seconds"] > 0 for row in results["rows"])
    assert results["largest_difference"] == 0  # on a CPU both are the plain pipeline
    assert json.loads(file.read_text())["rows"] == results["rows"]
    assert "1.00 times as fast as the recipe's" in capsys.readouterr().out


def test_the_median_of_several_calls_is_taken():
    pauses = iter([0.4, 0.0, 0.4, 0.0])  # the first is the warm-up
    assert median_ms(lambda: time.sleep(next(pauses)), repeats=3, on_gpu=False) < 300
    assert next(pauses, None) is None


PEER = """
import sys, time
for step in (0, 1, 2):
    print(f"{step}/2", flush=True)
    time.sleep(0.2)
"""


@pytest.mark.slow
def test_the_whole_wait_is_measured_part_by_part(tmp_path, capsys):
    (tmp_path / "peer.py").write_text(PEER)
    file = tmp_path / "start.json"
    flags = ["--steps=2", f"--peer={tmp_path / 'peer.py'}", f"--json={file}"]
    start.main([*flags, "--parts", "warm", "evaluate"])
    results = start.main([*flags, "--parts", "peer"])
    assert json.loads(file.read_text()) == results
    warm, evaluated, peer = (results[part] for part in ("warm", "evaluate", "peer"))
    assert 0 < warm["start_of_worker"] < warm["first_step"] < warm["prompt_back"]
    assert warm["from_the_last_step"] > 0 and "saved" in warm["seconds_after_start"]
    assert evaluated["num_images"] == 4 and evaluated["seconds_after_start"]["sampled"] < evaluated["prompt_back"]
    assert 0.2 <= peer["first_step"] < peer["prompt_back"]
    assert "warm: first_step " in capsys.readouterr().out


@pytest.mark.slow
def test_run_sh_is_timed(monkeypatch):
    for name, value in dict(MAX_TRAIN_STEPS=2, NUM_IMAGES=1, NUM_DRIFT_IMAGES=0, NUM_INFERENCE_STEPS=2).items():
        monkeypatch.setenv(name, str(value))
    before = dict(os.environ)
    assert start.main(["--parts", "run_sh"])["run_sh"]["prompt_back"] > 5
    assert dict(os.environ) == before
