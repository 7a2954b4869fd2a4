"""What a launcher's variables say about a process: torchrun's, or a job operator's that sets the same names.

No other module reads them. Without RANK and WORLD_SIZE a process is a run of its own, whatever else is set.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

# Launchers that start processes which have to find each other: how many there are, which it is, and on its machine.
OTHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
}
DRAWS_AFTERWARDS = "DREAMBOOTH_DRAWS"  # run.sh's: denoising steps of the pictures that it draws after the training
HOW_TO_START = "start one torchrun a machine, which starts the others: torchrun --nproc_per_node N train_..."


def has_launcher() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process as a rank of a run."""
    own, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_rank = own.isdecimal() and count.isdecimal() and int(own) < int(count)
    return is_rank and (count == "1" or bool(os.environ.get("MASTER_ADDR")))


def rank() -> int:
    """This process's number among all of the run's, from 0."""
    return _number("RANK", 0)


def num_ranks() -> int:
    """How many processes the run has, on all machines."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's; a launcher that says none starts one a machine."""
    names = ("LOCAL_RANK", *(local for _, _, local in OTHERS.values()))
    return next((_number(name, 0) for name in names if os.environ.get(name)), 0)


def local_world_size() -> int | None:
    """How many processes the run has on this machine; None without torchrun."""
    return _number("LOCAL_WORLD_SIZE", 0) or None


def check_launcher() -> Iterator[str]:
    """Notes on variables that mean nothing; UserError if this process cannot be the rank that they mean."""
    if has_launcher():
        return
    for launcher, (size, own_rank, _) in OTHERS.items():
        number, count = os.environ.get(own_rank), os.environ.get(size, "1")
        if number and (number, count) != ("0", "1"):
            several = f"{launcher} starts several tasks ({own_rank}={number}, {size}={count})"
            raise UserError(f"{several}, each of which would be a run of its own; {HOW_TO_START}")
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    said = [f"{name}={value}" for name, value in values.items() if value]  # an empty one is none
    if values["RANK"] and values["WORLD_SIZE"]:
        raise UserError(f"{', '.join(said)}: no rank of a run, which has all three; unset them, or {HOW_TO_START}")
    if said:
        yield f"{', '.join(said)} means nothing here: this process is a run of its own; {HOW_TO_START}"


def torchrun_flags() -> list[str]:
    """Those that start as many processes again: on each machine, and on how many machines if there are several."""
    here = local_world_size() or (num_ranks() if os.environ.get("LOCAL_RANK") else 1)
    machines = num_ranks() // here
    return ["--nproc_per_node", str(here), *(["--nnodes", str(machines)] if machines > 1 else [])]


def num_restarts() -> int:
    """How often torchrun has started the run again after a process died."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def launch() -> list[str] | None:
    """Which start of torchrun this process belongs to: its run id ("none" by default) and its agent, our parent."""
    if not under_torchrun():
        return None
    started = ""
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return [os.environ["TORCHELASTIC_RUN_ID"], f"{socket.gethostname()} {os.getppid()} {started}".strip()]


def is_restarted(before: list[str] | None, may_start_over: bool) -> bool:
    """Whether torchrun starts this process in the place of one of the run that began as `before`, its launch().

    Its agent did that, or has left, so that rank 0 is on another machine: then somebody gave a run id. One that was
    used before begins a new run if it may start over.
    """
    own = launch()
    if own is None or before is None or own[0] != before[0]:
        return False
    elsewhere = not is_main() and local_world_size() != num_ranks()
    if own[0] == "none" and elsewhere:
        return num_restarts() > 0
    return own == before or own[0] != "none" and (elsewhere or num_restarts() > 0 or not may_start_over)


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return rank() == 0


def draws_afterwards() -> int | None:
    """About how many denoising steps of one picture follow, under run.sh; None if nothing does."""
    number = os.environ.get(DRAWS_AFTERWARDS, "")
    return int(number) if number.isdecimal() else None


def under_torchrun() -> bool:
    """Whether torchrun started this process, and passes signals on to it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def meeting_place() -> tuple[str, int]:
    """Address and port of the store that the ranks meet in."""
    if not has_launcher():
        return "127.0.0.1", 0
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", 29500)  # torchrun's


def agent_has_store() -> bool:
    """Whether torchrun's agent has opened that store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextlib.contextmanager
def as_torchrun_says_it() -> Iterator[None]:
    """A context in which the variables that ColossalAI reads are there, whoever started this process."""
    address, port = meeting_place()
    numbers = dict(RANK=rank(), LOCAL_RANK=local_rank(), WORLD_SIZE=num_ranks())
    values = {name: str(value) for name, value in numbers.items()} | dict(MASTER_ADDR=address, MASTER_PORT=str(port))
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "") if has_launcher() else ""
    return int(value) if value.isdecimal() else default
