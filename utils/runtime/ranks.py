"""What ranks have to agree on: a mistake that one of them finds is everyone's, and so is a signal to one of them."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from utils.errors import UserError, shortened
from utils.runtime.environment import agent_has_store, meeting_place, num_ranks, rank, under_torchrun

T = TypeVar("T")
EXIT_LOST_RANK = 3
# How gloo and NCCL report that the other end of a connection is gone.
LOST_RANK_SIGN = re.compile(
    r"gloo|nccl|connection (was likely )?(closed|reset|refused)|remote process exited|broken pipe|wait timeout", re.I
)
SECONDS_TO_MEET = 600  # as torchrun's and NCCL's own; a rank may hash gigabytes on a slow disk first
IN_TIME = f"within {SECONDS_TO_MEET // 60} minutes"


def meet(ready: Callable[[], dict], differences: Callable[[dict, dict], list[str]]) -> dist.Store | None:
    """Waits for all ranks and compares what each says of its inputs: `ready()`, JSON values, alike on all.

    Raises UserError on all of them if one differs from rank 0, if `ready` is a mistake somewhere, or if one does not
    come; where it is rank 0 itself, the others say so and exit. Returns a store that nobody else writes to; None, and
    nothing is compared, if there is one rank.
    """
    if num_ranks() == 1:
        ready()
        return None
    complaint, inputs = None, {}
    try:
        inputs = ready()
    except (UserError, OSError) as error:
        complaint = str(error)
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch waits without Python's handlers
    with _rank_0_in_time():
        room, missing = _room(_store(), json.dumps([complaint, inputs]))
    signal.signal(signal.SIGINT, handler)
    if rank() == 0:
        come = [number for number in range(num_ranks()) if number not in missing]
        said = [json.loads(room.get(f"inputs-{number}")) for number in come]
        absent = f"of {num_ranks()} ranks these have not come {IN_TIME}: {', '.join(map(str, missing))}"
        room.set("verdict", absent if missing else _verdict(said, differences))
    room.wait(["verdict"], timedelta(seconds=2 * SECONDS_TO_MEET))
    if verdict := room.get("verdict").decode():
        room.set(f"heard-{rank()}", "")
        if rank() == 0:  # the store may end with it
            with contextlib.suppress(RuntimeError):
                room.wait([f"heard-{number}" for number in come], timedelta(seconds=10))
        raise UserError(verdict)
    return room


@contextlib.contextmanager
def _rank_0_in_time() -> Iterator[None]:
    """A context that ends the process in one line, with code 3, if rank 0 is not there, which else speaks for all."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        if rank() == 0:
            raise
        place = "{}, port {}".format(*meeting_place())
        print(f"error: rank {rank()}: rank 0 has not come {IN_TIME} to {place}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_LOST_RANK) from error


def _store() -> dist.Store:
    """The launcher's store, or rank 0's. It does not wait for the others itself: it would not say who is missing."""
    is_own, patience = rank() == 0 and not agent_has_store(), timedelta(seconds=SECONDS_TO_MEET)
    options: Any = dict(is_master=is_own, timeout=patience, wait_for_workers=False, multi_tenant=True)
    return dist.TCPStore(*meeting_place(), num_ranks(), **options)


def _room(store: dist.Store, inputs: str) -> tuple[dist.Store, list[int]]:
    """The part of a store that these ranks alone write to, with their inputs, and who has not come, on rank 0: after a
    restart torchrun's still holds what the ranks wrote that died. Rank 0 names it to those that have just knocked.
    """
    end, missing, name = time.monotonic() + SECONDS_TO_MEET, list(range(1, num_ranks())), uuid.uuid4().hex
    if rank() == 0:
        room = dist.PrefixStore(name, store)
        room.set("inputs-0", inputs)
        while missing and time.monotonic() < end:
            knocked = [f"knock-{number}" for number in missing if store.check([f"knock-{number}"])]
            store.set("room", json.dumps([name, *(store.get(knock).decode() for knock in knocked)]))
            time.sleep(0.05)
            missing = [number for number in missing if not room.check([f"inputs-{number}"])]
        return room, missing
    store.set(f"knock-{rank()}", name)
    while name not in (found := json.loads(store.get("room"))):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)
    room = dist.PrefixStore(found[0], store)
    room.set(f"inputs-{rank()}", inputs)
    return room, []


def _verdict(said: list, differences: Callable[[dict, dict], list[str]]) -> str:
    """What is wrong with what the ranks said, [complaint, inputs] each, in one line; empty if nothing is."""
    complaints, inputs = zip(*said, strict=True)
    for number, complaint in enumerate(complaints):
        if complaint is not None:
            return complaint if complaint == complaints[0] else f"rank {number}: {complaint}"
    for number, other in enumerate(inputs):
        if found := differences(inputs[0], other):
            return f"rank {number} has not what rank 0 has ({'; '.join(shortened(found))}): give all ranks the same"
    return ""


def on_all_ranks(function: Callable[[], T], *, main_only: bool = False) -> T:
    """Runs `function` on every rank, or on rank 0 for all; a UserError on any rank is raised on all of them.

    So is an OSError (a full disk, no permission), as a UserError. It also keeps ranks in step: none returns before all
    have called it. Returns the rank's own result, or rank 0's.
    """
    result: Any = None
    complaint: str | None = None
    if not main_only or dist.get_rank() == 0:
        try:
            result = function()
        except (UserError, OSError) as error:
            complaint = str(error)
    said: list[Any] = [(complaint, result if main_only else None)] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(said, said[0])
    for complaint, _ in said:
        if complaint is not None:
            raise UserError(complaint)
    return said[0][1] if main_only else result


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether an error says that another rank is gone."""
    return isinstance(error, RuntimeError) and num_ranks() > 1 and bool(LOST_RANK_SIGN.search(str(error)))


def lost_rank_line() -> str:
    """What a rank says then."""
    return f"error: rank {rank()}: another process of this run has ended, and said why, so this one ends too"


@contextlib.contextmanager
def lost_rank_in_one_line() -> Iterator[None]:
    """When another rank has died, this one exits with code 3 and a line: torchrun names that one a moment later."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        print(lost_rank_line(), file=sys.stderr, flush=True)
        raise SystemExit(EXIT_LOST_RANK) from None


WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # time is nearly up; the last one comes every second
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
TORCHRUN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of 2026's versions on; 30 s before
SECONDS_WORTH_A_WARNING = 20
SECONDS_OF_ONE_SIGNAL = 1.0  # Ctrl-C reaches a process from the terminal and, a moment later, from torchrun


class StopRequest:
    """Whether the run shall stop early, as an exit code: 0 (no), 1 (a failure), 128 + the signal.

    A thread of its own counts the signals, so that a second one works also while the main thread waits for the GPU or
    for another rank. The ranks agree through a gloo group of host memory: the GPU is never waited for.
    """

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.checkpoint_seconds = 0.0  # that the last one took, as far as known
        self._code = 0
        self._first_at = 0.0  # when a signal came that is not a warning
        self._previous: dict = {}
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._votes: tuple | None = None
        if threading.current_thread() is not threading.main_thread():
            return  # only that one may say how signals are handled
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in heard_signals()}
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, args=(reader,), name="signals", daemon=True).start()

    def _count(self, reader: socket.socket) -> None:
        while received := reader.recv(1):
            if received[0] not in SIGNALS:
                continue
            if not self._code:
                self._code = 128 + received[0]
                if self.is_main:
                    print(f"\n{signal_line(received[0], self.checkpoint_seconds)}", file=sys.stderr, flush=True)
            if received[0] in WARNINGS:
                continue
            self._first_at = self._first_at or time.monotonic()
            if time.monotonic() - self._first_at > SECONDS_OF_ONE_SIGNAL:
                os._exit(self._code)
        reader.close()

    def poll(self, own_code: int = 0) -> int:
        """The exit code that all ranks agree on: the largest of what each of them knew one call ago (alone: now).

        Every rank calls it after every step; what it returns is the same on all of them. Raises RuntimeError if
        another rank has died.
        """
        code = max(self._code, own_code)
        if self._group is None:
            return code
        known = self._last_vote()
        vote = torch.tensor([code])
        self._votes = vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return known

    def _last_vote(self) -> int:
        if self._votes is None:
            return 0
        vote, work = self._votes
        work.wait()
        self._votes = None
        return int(vote)

    def poll_at_the_end(self, own_code: int = 0) -> int:
        """As `poll`, but with what the ranks know now; waits for all of them."""
        self.poll(own_code)
        return self._last_vote() if self._group is not None else max(self._code, own_code)

    def wait_for_all(self) -> None:
        """Waits, outside of the GPU's queue, until every rank is here."""
        if self._group is not None:
            dist.barrier(self._group)

    def close(self) -> None:
        """Signals do again what they did before."""
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        self._writer.close()


def signal_line(number: int, checkpoint_seconds: float) -> str:
    """What is said on a first signal; `checkpoint_seconds` is what the last checkpoint took."""
    name = signal.Signals(number).name
    line = f"{name}: the step is finished and a checkpoint written; a second signal ends at once"
    if checkpoint_seconds <= SECONDS_WORTH_A_WARNING or not under_torchrun() or TORCHRUN_VARIABLE in os.environ:
        return line
    return (
        f"{line}. The last checkpoint took {checkpoint_seconds:.0f} s: if the signal was sent to torchrun, it kills "
        f"this process 30 s later unless told to wait longer ({TORCHRUN_VARIABLE}=300), and the checkpoint before it "
        f"is the last"
    )


def heard_signals() -> list[signal.Signals]:
    """SIGNALS, but for SIGHUP under nohup."""
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not under_nohup]


def torchrun(argv: list[str]) -> int:
    """torchrun, but every signal goes to the ranks as it is, and what comes back is the exit code of the first to end.

    torchrun by itself passes some of them on, kills the ranks 30 s later, and ends with 1 and a traceback. Its agent
    handles none in a thread.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    os.environ.setdefault(TORCHRUN_VARIABLE, "30")  # its default; no signal comes from it, so it warns of nothing
    received: list[int] = []
    for each in heard_signals():
        signal.signal(each, lambda number, _: received.append(number))
    with ThreadPoolExecutor(1) as threads:
        agent = threads.submit(lambda: run.run(run.parse_args(argv)))
        while wait([agent], 0.1).not_done:
            ranks = psutil.Process().children()
            while ranks and received:
                number = received.pop(0)
                for process in ranks:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
    try:
        agent.result()
        return 0
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        code = failure.exitcode
        if code >= 0:
            return code
        print(f"rank {first} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        return 128 - code
