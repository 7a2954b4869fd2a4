"""Two runs never work in one output folder at the same time; a killed one is in nobody's way."""

import errno
import fcntl
import os
import signal
import socket
import threading

import pytest

import evaluate
import train_dreambooth_colossalai as script
from tests.helpers.processes import Process, finish, pause_after, start_ranks, wait_for
from tests.helpers.script import LATEST, as_argv, rows, run, run_json
from utils.command_line import run_main
from utils.errors import EXIT_TRY_AGAIN, UserError
from utils.files import lock
from utils.files.lock import SECONDS_FOR_A_DYING_RUN, check_not_in_use, hold_output
from utils.files.ownership import HOLDER_FILE, LOCK_FILE


def wait_less() -> None:
    lock.SECONDS_FOR_A_DYING_RUN = 0.2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_run_is_refused_and_the_first_goes_on(flags, output, tmp_path, num_ranks):
    first = start_ranks(num_ranks, as_argv(flags | dict(max_train_steps=5000)), tmp_path / "first")
    wait_for(lambda: len(rows(output)) > 2)
    for changes in (LATEST, dict(overwrite_output_dir=True), dict(dry_run=True)):
        second = Process(as_argv(flags | changes), tmp_path / "second", wait_less)
        assert second.wait() == EXIT_TRY_AGAIN
    text = second.text()
    holder = f"process {first[0].pid} on {socket.gethostname()}"
    assert text.count(f"--output_dir {output} is in use by another run ({holder}): wait for it, end it") == 3
    assert "Traceback" not in text
    first[0].kill(signal.SIGTERM)
    assert finish(first) == [143] * num_ranks and run_json(output)["status"] == "stopped"
    assert not list(output.glob(".*"))


def test_an_evaluation_in_a_folder_that_is_in_use_is_refused(tmp_path, capsys):
    argv = [f"--output_dir={tmp_path / 'result'}", "--only=report"]
    with hold_output(tmp_path / "result", is_main=True):
        assert run_main(evaluate.main, argv) == EXIT_TRY_AGAIN
    assert f"--output_dir {tmp_path / 'result'} is in use by another run" in capsys.readouterr().err


def test_both_started_at_once(flags, tmp_path):
    """Both pass the checks before either holds the lock: one of them trains."""
    output, argv = tmp_path / "output", as_argv(flags | dict(max_train_steps=12))

    def texts_of_both() -> str:
        return "".join((tmp_path / name).read_text() for name in "ab")

    def meet_after_the_preflight() -> None:
        run_preflight = script.run_preflight

        def run_and_wait(*args):
            ready = run_preflight(*args)
            (tmp_path / f"{os.getpid()}.checked").touch()
            wait_for(lambda: len(list(tmp_path.glob("*.checked"))) == 2)
            return ready

        script.run_preflight = run_and_wait
        pause_after(6, lambda: "is in use" in texts_of_both())()

    both = [Process(argv, tmp_path / name, meet_after_the_preflight) for name in "ab"]
    assert sorted(finish(both)) == [0, EXIT_TRY_AGAIN]
    texts = [process.text() for process in both]
    assert sum("is in use by another run" in text for text in texts) == 1
    assert len(rows(output)) == 12 and not list(output.glob(".*"))


def test_a_lock_that_is_left_alone_does_not_make_a_folder_foreign(flags, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / LOCK_FILE).touch()
    (tmp_path / "output" / HOLDER_FILE).write_text("process 1 on elsewhere\n")
    assert len(run(flags)) == 3


def test_a_dying_run_is_waited_for(tmp_path):
    with open(tmp_path / LOCK_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        check_not_in_use(tmp_path)
    assert 0.5 < SECONDS_FOR_A_DYING_RUN <= 3


def test_a_lock_file_removed_while_waiting_is_made_anew(tmp_path):
    path = tmp_path / LOCK_FILE
    path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def leave() -> None:
            path.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)

        threading.Timer(0.1, leave).start()
        with hold_output(tmp_path, is_main=True):
            assert (tmp_path / HOLDER_FILE).read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(UserError, match="is in use by another run"), hold_output(tmp_path, is_main=True):
                pass
            assert path.exists()
    assert not path.exists() and not (tmp_path / HOLDER_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(flags, tmp_path, capsys, monkeypatch, number):
    def refuse(descriptor, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(run(flags)) == 3
    said = capsys.readouterr().err
    assert said.count("cannot be locked") == 1 and "start no second run into this folder" in said


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), hold_output(tmp_path / "new", is_main=True):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
