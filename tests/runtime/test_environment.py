"""What launchers' variables say, and what a process without them is."""

import os

import pytest

from utils.errors import UserError
from utils.runtime import environment


@pytest.fixture
def launched(monkeypatch):
    """launched(NAME=value, ...): these are all the variables that a launcher has set."""
    names = [name for name in os.environ if name.startswith(("TORCHELASTIC", "SLURM", "OMPI", "PMI", "MASTER_"))]
    for name in [*names, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


def seen_by_colossalai() -> dict[str, str]:
    """The variables that it reads; what there was is there again afterwards."""
    before = dict(os.environ)
    with environment.as_torchrun_says_it():
        found = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert dict(os.environ) == before
    return found


ALONE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(WORLD_SIZE=4),
        dict(RANK=3),
        dict(RANK="", WORLD_SIZE="", LOCAL_RANK=""),  # an empty line of an environment file sets nothing
        dict(WORLD_SIZE=4, MASTER_ADDR="head", MASTER_PORT=1),
        dict(LOCAL_RANK=2, LOCAL_WORLD_SIZE=4),
        dict(SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NTASKS=4),  # a batch script, and not srun
        dict(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=1),
    ],
    ids=str,
)
def test_without_rank_and_world_size_a_process_is_a_run_of_its_own(launched, given):
    launched(**given)
    notes = list(environment.check_launcher())
    assert len(notes) == bool(given.get("RANK") or given.get("WORLD_SIZE")) and all(
        "torchrun" in note for note in notes
    )
    assert seen_by_colossalai() == ALONE and environment.launch() is None
    assert environment.local_world_size() is None and environment.torchrun_flags() == ["--nproc_per_node", "1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2), "srun"),
        (dict(SLURM_PROCID=1, SLURM_NTASKS=2, WORLD_SIZE=2), "srun"),
        (dict(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=2), "mpirun"),
        (dict(PMI_RANK=1, PMI_SIZE=2), "mpiexec"),
        (dict(RANK="x", WORLD_SIZE=2), "RANK=x"),
        (dict(RANK=2, WORLD_SIZE=2, MASTER_ADDR="head"), "RANK=2, WORLD_SIZE=2"),
        (dict(RANK=1, WORLD_SIZE=2), "RANK=1, WORLD_SIZE=2: no rank of a run"),
    ],
    ids=str,
)
def test_a_process_that_cannot_be_the_rank_that_is_meant_names_torchrun(launched, given, said):
    launched(**given)
    with pytest.raises(UserError, match=f"{said}.*torchrun --nproc_per_node"):
        list(environment.check_launcher())
    assert environment.is_main() and environment.num_ranks() == 1, "it says so itself, and waits for nobody"


@pytest.mark.parametrize(
    ("given", "local_rank", "flags"),
    [
        ({}, "0", ["--nproc_per_node", "1", "--nnodes", "8"]),  # a job operator: one process a machine
        (dict(SLURM_PROCID=5, SLURM_LOCALID=1, SLURM_STEP_NUM_TASKS=8, LOCAL_RANK=""), "1", None),
        (dict(LOCAL_RANK=1, LOCAL_WORLD_SIZE=4), "1", ["--nproc_per_node", "4", "--nnodes", "2"]),
    ],
    ids=str,
)
def test_a_rank_of_a_run(launched, given, local_rank, flags):
    launched(RANK=5, WORLD_SIZE=8, MASTER_ADDR="head", **given)
    assert not list(environment.check_launcher()) and not environment.is_main()
    rank = dict(RANK="5", LOCAL_RANK=local_rank, WORLD_SIZE="8", MASTER_ADDR="head", MASTER_PORT="29500")
    assert seen_by_colossalai() == rank and flags in (None, environment.torchrun_flags())


def test_a_start_of_torchrun_is_told_from_another(launched, monkeypatch):
    launched(TORCHELASTIC_RUN_ID="none")
    this = environment.launch()
    assert this == environment.launch() and f" {os.getppid()} " in this[1]
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert environment.launch() != this
