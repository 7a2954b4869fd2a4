"""Packages that only ColossalAI wants: broken or missing, they do not stop a run."""

import importlib
import os
import subprocess
import sys

import pytest

from tests.helpers.script import ROOT
from utils.command_line import run_main
from utils.runtime import stand_ins

BROKEN = {
    "bitsandbytes": 'raise RuntimeError("CUDA Setup failed\\nmany more lines")',
    "peft": 'raise ModuleNotFoundError("No module named \'peft\'", name="peft")',
    "galore_torch": "import no_such_module",
}


@pytest.fixture
def broken_packages(tmp_path) -> dict[str, str]:
    """An environment in which all three packages fail to import."""
    for name, source in BROKEN.items():
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "broken"), "OMP_NUM_THREADS": "1"}


def test_training_goes_on_without_them(broken_packages, tmp_path, tiny_pipeline_dir, photos_dir):
    argv = [f"--pretrained_model_name_or_path={tiny_pipeline_dir}", f"--instance_data_dir={photos_dir}"]
    argv += [
        f"--output_dir={tmp_path / 'output'}",
        "--instance_prompt=a cat",
        "--resolution=32",
        "--max_train_steps=1",
    ]
    command = [sys.executable, "train_dreambooth_colossalai.py", *argv]
    result = subprocess.run(command, cwd=ROOT, env=broken_packages, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "output/model_index.json").is_file()
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == list(BROKEN)
    assert "(CUDA Setup failed);" in notes[0] and "Traceback" not in result.stderr


def test_packages_that_work_are_left_alone():
    import peft

    with stand_ins.stand_ins() as broken:
        assert broken == {}
        assert sys.modules["peft"] is peft
    assert sys.modules["peft"] is peft


def test_stand_ins_are_gone_afterwards(monkeypatch):
    import importlib.util

    monkeypatch.setattr(stand_ins, "IMPORTED_NAMES", {"no_such_pkg": {"no_such_pkg.part": ["Thing"]}})
    with stand_ins.stand_ins() as broken:
        assert broken == {"no_such_pkg": "No module named 'no_such_pkg'"}
        from no_such_pkg.part import Thing

        assert isinstance(Thing, type)
    assert importlib.util.find_spec("no_such_pkg") is None and "no_such_pkg.part" not in sys.modules
    del sys.modules["no_such_pkg"]


def test_a_missing_package_is_one_line(capsys):
    def main(argv):
        importlib.import_module("no_such_module")

    assert run_main(main, []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: No module named 'no_such_module'; 'bash setup.sh'")
    with pytest.raises(ModuleNotFoundError):
        run_main(main, ["--debug"])
