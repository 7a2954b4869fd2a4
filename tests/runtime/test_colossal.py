"""NCCL's start, beside what comes before its first use; NCCL itself is a GPU's."""

import threading

import pytest
import torch

from utils.runtime import colossal


@pytest.fixture
def process_group(monkeypatch):
    """Answers of torch.distributed for one rank with NCCL, and what was asked for: numbers of threads' collectives."""
    group = dict(ranks=1, backend="nccl", collectives=[], goes_on=threading.Event())

    def all_reduce(vector):
        group["goes_on"].wait(10)
        group["collectives"].append(threading.current_thread().name)

    monkeypatch.setattr(colossal.dist, "get_world_size", lambda: group["ranks"])
    monkeypatch.setattr(colossal.dist, "get_backend", lambda: group["backend"])
    monkeypatch.setattr(colossal.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: None)
    return group


def test_nccl_starts_beside_and_is_waited_for_at_every_launch(process_group):
    """A notebook launches more than once in one process."""
    for number in (1, 2):
        process_group["goes_on"].clear()
        colossal._begin_to_connect()
        assert len(process_group["collectives"]) == number - 1
        threading.Timer(0.05, process_group["goes_on"].set).start()
        colossal._wait_until_connected()
        assert process_group["collectives"] == ["NCCL"] * number
    colossal._wait_until_connected()


def test_a_run_that_ends_before_it_is_boosted_waits_too(process_group, monkeypatch):
    """A damaged photo, say: NCCL does not bear to be torn down while it starts."""
    monkeypatch.setattr(
        colossal.dist, "destroy_process_group", lambda: process_group["collectives"].append("destroyed")
    )
    colossal._begin_to_connect()
    threading.Timer(0.05, process_group["goes_on"].set).start()
    colossal.leave()
    assert process_group["collectives"] == ["NCCL", "destroyed"]


@pytest.mark.parametrize("others", [dict(ranks=2), dict(backend="gloo")], ids=str)
def test_several_ranks_and_a_cpu_do_not_start_it(process_group, others):
    """Several ranks' first collective would depend on which of two threads is first."""
    process_group.update(others)
    process_group["goes_on"].set()
    colossal._begin_to_connect()
    colossal._wait_until_connected()
    assert process_group["collectives"] == []


def test_a_start_that_fails_is_left_to_the_first_use(process_group, monkeypatch, capfd):
    def fail(vector):
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(colossal.dist, "all_reduce", fail)
    colossal._begin_to_connect()
    colossal._wait_until_connected()
    assert capfd.readouterr().err == ""
