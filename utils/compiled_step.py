"""How a GPU is told to make the steps; with --compile both ways, timed, so that a run says whether that pays."""

import time
from argparse import Namespace
from collections.abc import Callable

import torch

from utils import fused_unet
from utils.train_step import CapturedStep, MicroBatch, TrainStep

TRIAL_STEPS = 20  # timed of each


def fastest_step(train_step: TrainStep, args: Namespace, device, say: Callable[[str], None]):
    """The step in a CUDA graph, where there is a GPU and the flags allow it; else as it is."""
    if device.type != "cuda" and args.compile:
        say("--compile is for GPUs: it changes nothing here")
    if device.type != "cuda" or args.no_cuda_graph:
        return train_step
    return (CompiledStep if args.compile else CapturedStep)(train_step, say)


class CompiledStep:
    """A CapturedStep that changes over to torch.compile after TRIAL_STEPS replays, and reports after as many more.

    Args:
        train_step: the eager step, its UNet fused.
        say: told that compilation begins, and what it cost and gained.
    """

    def __init__(self, train_step: TrainStep, say: Callable[[str], None]):
        self.train_step, self.say = train_step, say
        self.captured = CapturedStep(train_step, say)
        before = self.captured.num_warm_up_steps + 1  # the capture is replayed at once, too
        self._changeover = before + TRIAL_STEPS
        after = self._changeover + before
        self._timed = (before, self._changeover, after, after + TRIAL_STEPS)
        self._times: list[float] = []
        self._num_calls = 0

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """As TrainStep's; the result is overwritten by the next call."""
        if self._num_calls in self._timed:
            torch.cuda.synchronize()
            self._times.append(time.perf_counter())
        if self._num_calls == self._changeover:
            self._change_over()
        if self._num_calls == self._timed[-1]:
            self.say(report(*self._times))
        self._num_calls += 1
        return self.captured(micro_batches)

    def _change_over(self) -> None:
        self.say("torch.compile begins; it takes minutes")
        unet = self.train_step.unet.unwrap()
        fused_unet.uninstall(unet)
        unet.compile(dynamic=False)
        self.captured = CapturedStep(self.train_step, self.say)


def report(start: float, changeover: float, compiled: float, end: float) -> str:
    """What torch.compile cost and gained, from the seconds at which the two trials began and ended."""
    before, after, cost = (changeover - start) / TRIAL_STEPS, (end - compiled) / TRIAL_STEPS, compiled - changeover
    measured = f"--compile took {cost:.0f} s; a step takes {1e3 * after:.1f} ms, it took {1e3 * before:.1f} ms"
    if after >= before:
        return f"{measured}: it never pays on this machine, leave it out"
    return f"{measured}: it pays in runs of more than {cost / (before - after):,.0f} steps"
