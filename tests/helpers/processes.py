"""Runs of the training script in processes of their own that can be killed: forked, so that imports cost nothing."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.run.logs import TrainingLog
from utils.run.loop import TrainingRun


class Process:
    """The script's main in a forked process; what it prints goes to `output`."""

    def __init__(self, argv: list[str], output: Path, prepare: Callable[[], None] | None = None, **environment: str):
        self.output = output
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._run(argv, prepare, environment)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)  # even if there is nowhere left to print to: one process of pytest is enough

    def _run(self, argv: list[str], prepare, environment: dict) -> None:
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        tqdm.set_lock(threading.RLock())  # its own one is shared with this process's parent, kill or no kill
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update(environment)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, of which the script takes note
        if prepare:
            prepare()
        code = run_main(main, argv)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, negative for the signal that ended it; kills it and fails if it takes too long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.kill()
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s:\n{self.text()}")

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(num_ranks: int, argv: list, output: Path, prepare=None, **environment: str) -> list[Process]:
    """One Process per rank, as torchrun starts them; `argv` is that of all, or a list of each rank's."""
    if num_ranks == 1:
        return [Process(argv, output, prepare, **environment)]
    shared = dict(environment, WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    shared |= dict(LOCAL_WORLD_SIZE=str(num_ranks))
    each = argv if isinstance(argv[0], list) else [argv] * num_ranks
    return [Process(each[r], output, prepare, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(num_ranks)]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def after_step(step: int, action: Callable[[], None]) -> Callable[[], None]:
    """A `prepare` with which `action` is called in the run once step `step`, counted from 1, is in metrics.jsonl.

    A run that starts after that step calls it after its first.
    """

    def prepare() -> None:
        log_step, called = TrainingLog.step, []

        def step_and_act(self, global_step, metrics):
            log_step(self, global_step, metrics)
            if global_step >= step and not called:
                called.append(global_step)
                action()

        TrainingLog.step = step_and_act

    return prepare


def pause_after(step: int, released: Callable[[], bool]) -> Callable[[], None]:
    """A `prepare` with which the run waits after step `step` until `released()`, so that a test has time to act."""
    return after_step(step, lambda: wait_for(released))


def die_after(step: int) -> Callable[[], None]:
    """A `prepare` with which the run kills itself after step `step`, whose log and checkpoint are on the disk."""

    def prepare() -> None:
        checkpoint_if_due = TrainingRun._checkpoint_if_due

        def and_die(self, number: int) -> None:
            checkpoint_if_due(self, number)
            if number == step:
                if self.checkpointer is not None:
                    self.checkpointer.wait()
                self.log.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        TrainingRun._checkpoint_if_due = and_die

    return prepare


def finish(ranks: list[Process]) -> list[int]:
    """The exit codes."""
    return [process.wait() for process in ranks]
