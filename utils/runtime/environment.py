"""What torchrun tells a process about itself; without torchrun a run is one process.

No other module reads torchrun's variables.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def rank() -> int:
    """This process's number among all of the run's, from 0."""
    return _number("RANK", 0)


def num_ranks() -> int:
    """How many processes the run has, on all machines."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int | None:
    """How many processes the run has on this machine; None without torchrun."""
    return _number("LOCAL_WORLD_SIZE", 0) or None


def torchrun_flags() -> list[str]:
    """Those that start as many processes again: on each machine, and on how many machines if there are several."""
    here = local_world_size() or num_ranks()
    machines = num_ranks() // here
    return ["--nproc_per_node", str(here), *(["--nnodes", str(machines)] if machines > 1 else [])]


def num_restarts() -> int:
    """How often torchrun has started the run again after a process died."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def launch_id() -> str | None:
    """Which start of torchrun this process belongs to, the same if its agent starts it again; None without torchrun.

    Its run id if somebody gave one, else the torchrun process, which is the parent of this one.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":
        return run_id
    started = ""
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {os.getppid()} {started}".strip()


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return rank() == 0


def has_launcher() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process."""
    return "RANK" in os.environ


def under_torchrun() -> bool:
    """Whether torchrun started this process, and passes signals on to it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """A context in which a process that was started without torchrun looks like torchrun's only one."""
    if has_launcher():
        yield
        return
    os.environ.update(SINGLE_PROCESS)
    try:
        yield
    finally:
        for name in SINGLE_PROCESS:
            del os.environ[name]


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
