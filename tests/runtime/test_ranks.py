"""Signals: a run that is asked to stop keeps its state."""

import fcntl
import functools
import os
import signal
import termios
import time

import pytest

from tests.helpers.processes import Process, finish, pause_after, start_ranks, wait_for
from tests.helpers.script import LATEST, as_argv, rows, run_json
from utils.run.checkpoint import Checkpointer
from utils.run.lineage import list_checkpoints
from utils.runtime import ranks


def know_it_at_the_same_step() -> None:
    """A `prepare`: every rank waits for its signal before it votes for the fourth time."""
    poll, votes = ranks.StopRequest.poll, []

    def late_poll(self, own_code: int = 0) -> int:
        votes.append(own_code)
        if len(votes) == 4:  # step 4 is in the log, so that the third vote is over
            wait_for(lambda: self._code)
        return poll(self, own_code)

    ranks.StopRequest.poll = late_poll


class TestSignals:
    """A signal on any rank ends the run after the step, with the state kept."""

    @pytest.mark.parametrize(
        ("num_ranks", "signalled", "number"),
        [
            (1, [0], signal.SIGINT),
            (1, [0], signal.SIGTERM),
            (1, [0], signal.SIGHUP),
            (1, [0], signal.SIGUSR1),
            (2, [1], signal.SIGTERM),
            (2, [0, 1], signal.SIGTERM),
        ],
    )
    def test_the_state_is_kept(self, flags, output, tmp_path, num_ranks, signalled, number):
        argv = as_argv(flags | dict(max_train_steps=5000))
        ranks = start_ranks(num_ranks, argv, tmp_path / "text", know_it_at_the_same_step if signalled[1:] else None)
        wait_for(lambda: len(rows(output)) > 3)
        for rank in signalled:
            ranks[rank].kill(number)
        assert finish(ranks) == [128 + number] * num_ranks
        (checkpoint,) = list_checkpoints(output)
        assert checkpoint.step == len(rows(output)) and run_json(output)["status"] == "stopped"
        text = ranks[0].text()
        assert f"stopped after step {checkpoint.step} of 5000 ({number.name}). The state" in text
        assert "Traceback" not in text
        command = text.strip().splitlines()[-1]
        assert f"--nproc_per_node {num_ranks} " in command and "--resume_from_checkpoint latest" in command
        assert not list(output.glob(".*"))

    def test_nohup(self, flags, tmp_path):
        argv = as_argv(flags | dict(max_train_steps=10))
        sent = tmp_path / "sent"

        def under_nohup() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            pause_after(4, sent.exists)()

        process = Process(argv, tmp_path / "text", under_nohup)
        wait_for(lambda: len(rows(tmp_path / "output")) > 3)
        process.kill(signal.SIGHUP)
        sent.touch()
        assert process.wait() == 0

    def test_the_terminal_is_closed(self, flags, output, tmp_path):
        """A connection that breaks: the run gets SIGHUP, and whatever it prints from then on is an error."""
        ours, terminal = os.openpty()

        def use_the_terminal() -> None:
            os.close(ours)
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            os.dup2(terminal, 1), os.dup2(terminal, 2)
            os.close(terminal)

        process = Process(as_argv(flags | dict(max_train_steps=5000)), tmp_path / "text", use_the_terminal)
        os.close(terminal)
        wait_for(lambda: len(rows(output)) > 3)
        os.close(ours)
        assert process.wait() == 128 + signal.SIGHUP
        (checkpoint,) = list_checkpoints(output)
        assert checkpoint.step == len(rows(output)) and run_json(output)["status"] == "stopped"

    def test_warnings_do_not_end_it_at_once(self, flags, output, tmp_path):
        """The kernel sends SIGXCPU every second; a scheduler's SIGTERM follows its warning."""
        argv = as_argv(flags | dict(max_train_steps=5000))
        process = Process(argv, tmp_path / "text", functools.partial(setattr, ranks, "SECONDS_OF_ONE_SIGNAL", -1))
        wait_for(lambda: len(rows(output)) > 3)
        for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGUSR2):
            process.kill(number)
        first = (128 + signal.SIGXCPU, 128 + signal.SIGUSR2)  # of several that have come Python sees the least first
        assert process.wait() in first and len(list_checkpoints(output)) == 1

    def test_a_second_signal_ends_at_once(self, flags, output, tmp_path):
        assert 0.05 < ranks.SECONDS_OF_ONE_SIGNAL < 1.2  # of a terminal and torchrun, Ctrl-C comes twice

        def never_finish_writing() -> None:
            ranks.SECONDS_OF_ONE_SIGNAL = 0
            fill = Checkpointer._fill

            def slow(self, folder, step):
                fill(self, folder, step)
                if step != 2:
                    time.sleep(1000)

            Checkpointer._fill = slow

        argv = as_argv(flags | dict(max_train_steps=5000, checkpointing_steps=2))
        process = Process(argv, tmp_path / "text", never_finish_writing)
        wait_for(lambda: (output / "checkpoint-2").is_dir())
        process.kill(signal.SIGINT)
        wait_for(lambda: "a second signal ends at once" in process.text())
        process.kill(signal.SIGINT)
        assert process.wait() == 130  # its checkpoint would take 1000 s
        assert [found.step for found in list_checkpoints(output)] == [2]
        resumed = Process(as_argv(flags | LATEST | dict(max_train_steps=4)), tmp_path / "resumed")
        assert resumed.wait() == 0 and not list(output.glob(".*"))

    @pytest.mark.parametrize(
        ("seconds", "run_id", "warns"), [(25.0, "x", True), (25.0, None, False), (5.0, "x", False)]
    )
    def test_a_slow_checkpoint_under_torchrun_is_warned_of(self, flags, tmp_path, seconds, run_id, warns):
        def slow_disk() -> None:
            write = Checkpointer._write

            def slow(self, step, arrived):
                line = write(self, step, arrived)
                self.seconds = seconds
                return line

            Checkpointer._write = slow

        environment = dict(TORCHELASTIC_RUN_ID=run_id) if run_id else {}
        argv = as_argv(flags | dict(max_train_steps=5000, checkpointing_steps=2))
        process = Process(argv, tmp_path / "text", slow_disk, **environment)
        wait_for(lambda: "checkpoint-4: " in process.text())
        process.kill(signal.SIGTERM)
        assert process.wait() == 143
        assert ("took 25 s: if the signal was sent to torchrun, it kills" in process.text()) == warns
