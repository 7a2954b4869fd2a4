"""run.sh passes every signal on to what it runs just now, and returns the exit code of what it ran."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest

from tests.helpers.processes import wait_for
from tests.helpers.script import EMBEDDED, ROOT, rows, run_json
from utils.runtime.ranks import SIGNALS

AS_PROCESS_1 = ["unshare", "--pid", "--fork", "--mount-proc"]
STAGES = dict(install="setup.sh", training="before_launch import main", evaluation="evaluate.py")
# In the place of setup.sh and python: waits in one stage for a signal, with a child as pip is one.
STAND_IN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys
if os.environ["STAGE"] in " ".join(sys.argv):
    for number in (1, 2, 10, 12, 15, 24):
        signal.signal(number, lambda number, _: (child.wait(9), os._exit(100 + number)))
    child = subprocess.Popen(["sleep", "100"])
    pathlib.Path("child").touch()
    signal.pause()
"""


@pytest.fixture(params=[(), AS_PROCESS_1], ids=["a-process", "process-1"])
def launcher(request):
    if request.param and subprocess.run([*request.param, "true"], capture_output=True).returncode:
        pytest.skip("this account may not make a namespace of processes")
    return request.param


@contextlib.contextmanager
def started(folder: Path, launcher=(), project: Path = ROOT, **options):
    """run.sh, and the process that signals are for; whatever happens, nothing is left of it. 3000 steps."""
    own = dict(OUTPUT_DIR=str(folder / "output"), RESULT_DIR=str(folder / "result"))
    small = dict(VENV=sys.prefix, MODEL_NAME=str(EMBEDDED), MAX_TRAIN_STEPS="3000", OMP_NUM_THREADS="1")
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) | options
    options["env"] = os.environ | small | own | options.get("env", {})
    process = subprocess.Popen([*launcher, "bash", project / "run.sh", "--train_batch_size=1"], cwd=folder, **options)
    try:
        if launcher:
            wait_for(psutil.Process(process.pid).children)
        yield process, psutil.Process(process.pid).children()[0] if launcher else process
    finally:
        for left in psutil.process_iter(["environ"]):
            if (left.info["environ"] or {}).get("OUTPUT_DIR") == own["OUTPUT_DIR"]:
                left.kill()


@pytest.mark.parametrize(
    ("stage", "number"),
    [*((stage, signal.SIGINT) for stage in STAGES if stage != "training"), *(("training", each) for each in SIGNALS)],
)
def test_a_signal_reaches_every_stage(tmp_path, launcher, stage, number):
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "setup.sh").write_text(f"exec '{tmp_path}/.venv/bin/python' setup.sh")
    stand_in = tmp_path / ".venv/bin/python"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    env, child = dict(STAGE=STAGES[stage], VENV=""), tmp_path / "child"
    with started(tmp_path, launcher, tmp_path, env=env) as (process, run_sh):
        wait_for(child.exists)
        run_sh.send_signal(number)
        assert process.wait(20) == 100 + number, "the exit code of what it ran"
        assert not [each for each in psutil.process_iter(["cwd"]) if each.info["cwd"] == str(tmp_path)]


def test_the_training_under_run_sh_keeps_its_state(tmp_path, launcher):
    output = tmp_path / "output"
    with started(tmp_path, launcher) as (process, run_sh):
        wait_for(lambda: len(rows(output)) > 2)
        run_sh.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 128 + signal.SIGTERM
    assert run_json(output)["status"] == "stopped" and (output / f"checkpoint-{len(rows(output))}").is_dir()
    assert "Traceback" not in said and "torchrun, it kills" not in said


def test_ctrl_c_in_a_terminal(tmp_path):
    """Two ranks: one answer, as if there were no torchrun."""
    ours, terminal = os.openpty()
    output = tmp_path / "output"

    def use_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=use_the_terminal)
    with started(tmp_path, env=dict(NPROC="2"), **streams) as (process, _):
        os.close(terminal)
        wait_for(lambda: len(rows(output)) > 2)
        os.write(ours, b"\x03")
        said = b""
        with contextlib.suppress(OSError):  # nobody has it open any more
            while part := os.read(ours, 10000):
                said += part
        assert process.wait(20) == 130
    os.close(ours)
    lines = [line.strip() for line in said.decode().replace("\r", "\n").partition("^C")[2].splitlines()]
    lines = [line for line in lines if line and "step/s" not in line]
    assert lines[0].startswith("SIGINT: the step is finished") and lines[1].startswith("checkpoint-")
    assert (
        lines[2].startswith("stopped after step") and "--resume_from_checkpoint latest" in lines[3] and not lines[4:]
    )
