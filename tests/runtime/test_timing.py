"""The clock of a run: each mark once, and a run of its own for each main()."""

import gc
import time

from tests.helpers.script import run, run_json
from utils.runtime.timing import Clock, nothing_collected


def test_a_mark_is_noted_the_first_time():
    clock = Clock(time.perf_counter() - 10)
    clock.mark("first step")
    before = dict(clock.marks)
    time.sleep(0.002)
    clock.mark("first step")
    assert clock.marks == before and 10 <= before["first step"] < 11


def test_two_runs_in_one_process_record_their_own_times(flags, tmp_path):
    times = []
    for name in ("one", "two"):
        started = time.perf_counter()
        run(flags, output_dir=tmp_path / name, max_train_steps=1)
        seconds = time.perf_counter() - started
        times.append(run_json(tmp_path / name)["result"]["seconds_after_start"])
    assert times[0].keys() == times[1].keys() and times[0] != times[1]
    assert times[1]["saved"] <= seconds


def test_nothing_is_collected_only_inside():
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
        with nothing_collected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
