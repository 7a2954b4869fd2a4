"""bench/evaluate.py on the embedded model: its rows, its comparison, its file."""

import json

import pytest

from bench import evaluate as bench


def check_rows(results: dict) -> None:
    assert [(row["name"], row["batch_size"]) for row in results["rows"]] == [
        ("recipe's loop, fp32", 1),
        ("evaluate.py's sampling", 1),
        ("evaluate.py's sampling", 2),
    ]
    recipe = results["rows"][0]["seconds_an_image"]
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(recipe / row["seconds_an_image"])
        assert row["images_a_second"] == pytest.approx(1 / row["seconds_an_image"])
        assert row["first_call_seconds"] > 0


def test_every_row_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", bench.torch.device("cpu"))
    monkeypatch.setattr(bench, "IS_GPU", False)
    flags = ["--quick", "--steps=1", "--batch_sizes", "1", "2", "--no_command", f"--json={tmp_path / 'bench.json'}"]
    results = bench.main(flags)
    check_rows(results)
    assert results["differences"]["pixels, graphs to plain, largest"] == 0  # on a CPU both are the plain pipeline
    assert 0 <= results["differences"]["latents, plain to fp32"] < 1e-3
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"] == results["rows"] and "command" not in written
    assert "times the recipe's" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command_is_timed(capsys):
    results = bench.main(["--quick", "--steps=1", "--batch_sizes", "1", "2"])
    check_rows(results)
    assert results["command"]["images"] == 4
    assert results["command"]["images_a_second"] == pytest.approx(4 / results["command"]["seconds"])
    assert "the whole command: 4 images" in capsys.readouterr().out
