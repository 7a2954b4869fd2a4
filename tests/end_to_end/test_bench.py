"""The benchmarks run on the embedded model on a CPU, so that what they print on a GPU is not their first run."""

import json

from bench import loss_curves, train_step


def test_train_step(tmp_path, capsys):
    file = tmp_path / "results.json"
    train_step.main(["--batch_sizes", "1", "--steps", "4", "--json", str(file)])
    results = json.loads(file.read_text())
    (ours,), (reference,) = results["ours"], results["reference"]
    assert len(ours["losses"]) == 4 and 0 < ours["ms_a_step"] < 1e3 * ours["whole_run_seconds"]
    assert ours["first_step_seconds"] < ours["whole_run_seconds"]
    assert reference["ms_a_step"] > 0
    said = capsys.readouterr().out
    assert "ours      batch 1:" in said and "reference batch 1:" in said and "floor" in said


def test_the_reference_loop_learns_what_the_script_learns(tmp_path, capsys):
    loss_curves.main([str(tmp_path), "--resolution=64", "--steps=6"])
    losses = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in loss_curves.NAMES}
    for ours, eager, reference in zip(*losses.values(), strict=True):
        assert ours == eager
        assert abs(ours / reference - 1) < 1e-4
    assert len(set(losses["reference"])) == 6
    assert "graph: differs from the reference's loss by" in capsys.readouterr().out
    assert (tmp_path / "loss_curves.svg").read_text().startswith("<svg xmlns=")
