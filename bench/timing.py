"""How long a call takes: the median of several, by device events on a GPU; and how long its kernels take."""

import collections
import statistics
import time
from collections.abc import Callable

import torch


def median_ms(function: Callable[[], object], repeats: int = 9, warm_up: int = 1, on_gpu: bool = True) -> float:
    """Median milliseconds of `function()` over `repeats` calls, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        function()
    call = _gpu_ms if on_gpu else _cpu_ms
    return statistics.median(call(function) for _ in range(repeats))


def _gpu_ms(function: Callable[[], object]) -> float:
    """One call's time between two events of the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cpu_ms(function: Callable[[], object]) -> float:
    """One call's time on the clock."""
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def kernels_of(function: Callable[[], object]) -> dict[str, list]:
    """{kernel: [microseconds, calls]} of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    totals: dict[str, list] = collections.defaultdict(lambda: [0.0, 0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name][0] += event.time_range.elapsed_us()
            totals[event.name][1] += 1
    return totals
