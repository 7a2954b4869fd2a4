"""What torchrun's variables say, and what a process without them is."""

import os

from utils.runtime import environment


def test_a_process_without_torchrun_is_a_run_of_its_own(monkeypatch):
    for name in [name for name in os.environ if "RANK" in name or name.endswith("WORLD_SIZE") or "ELASTIC" in name]:
        monkeypatch.delenv(name)
    assert environment.local_world_size() is None and not environment.under_torchrun()
    before = dict(os.environ)
    with environment.as_single_process():
        assert os.environ["WORLD_SIZE"] == "1" and os.environ["RANK"] == "0"
    assert dict(os.environ) == before


def test_a_start_of_torchrun_is_told_from_another(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    assert environment.launch_id() == "job-1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says if nobody gave one
    this = environment.launch_id()
    assert this == environment.launch_id() and f" {os.getppid()} " in this
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert environment.launch_id() != this


def test_torchruns_variables(monkeypatch):
    values = dict(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, TORCHELASTIC_RESTART_COUNT=2)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    assert (environment.rank(), environment.num_ranks(), environment.local_rank()) == (5, 8, 1)
    assert environment.local_world_size() == 4 and not environment.is_main()
    assert environment.num_restarts() == 2
    assert environment.torchrun_flags() == ["--nproc_per_node", "4", "--nnodes", "2"]
    before = dict(os.environ)
    with environment.as_single_process():
        assert dict(os.environ) == before
