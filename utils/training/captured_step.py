"""A training step captured in one CUDA graph."""

import contextlib
import sys
from collections.abc import Callable

import torch

from utils.data.batches import MicroBatch
from utils.errors import first_line
from utils.models.fused_unet import what_is_not_fused
from utils.training.train_step import TrainStep

WARM_UP_STEPS = 3  # eager steps before the capture: libraries choose algorithms, kernels are compiled
DDP_WARM_UP_STEPS = 12  # DistributedDataParallel rebuilds its buckets and measures itself during its first eleven


class CapturedStep:
    """A TrainStep whose every operation is captured in one CUDA graph after a few eager steps, then replayed.

    The eager step is the definition: the graph runs the same kernels on the same buffers, only without the host
    launching each. Everything must run on one stream that is not the default one (see `training_stream`).

    Args:
        train_step: the eager step.
        say: told, in one line, why the steps stay eager if the capture fails.
    """

    def __init__(self, train_step: TrainStep, say: Callable[[str], None]):
        self.train_step = train_step
        self.say = say
        self._num_eager = WARM_UP_STEPS if train_step.num_ranks == 1 else DDP_WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[MicroBatch] = []
        self._metrics: torch.Tensor | None = None

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """As TrainStep's; the result is overwritten by the next call."""
        if self._num_eager > 0:
            self._num_eager -= 1
            return self.train_step(micro_batches)
        if self._graph is None:
            try:
                self._capture(micro_batches)
            except RuntimeError as error:
                self._num_eager, self._graph = sys.maxsize, None
                self.say(f"the step could not be captured in a CUDA graph, so it runs eagerly: {first_line(error)}")
                return self.train_step(micro_batches)
        for static, fresh in zip(self._inputs, micro_batches, strict=True):
            for target, source in zip(static, fresh, strict=True):
                if target is not None and source is not None:
                    target.copy_(source, non_blocking=True)
        assert self._graph is not None and self._metrics is not None
        self._graph.replay()
        return self._metrics

    def _capture(self, micro_batches: list[MicroBatch]) -> None:
        self._inputs = [batch.clone() for batch in micro_batches]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._metrics = self.train_step(self._inputs)
        if self.train_step.optimizer.flat.grad_table is not None:
            self.train_step.optimizer.flat.bind_grads()
        self._graph = graph


def fastest_step(
    train_step: TrainStep,
    example: Callable[[], list[MicroBatch]],
    *,
    uses_cuda_graph: bool,
    say: Callable[[str], None],
) -> Callable[[list[MicroBatch]], torch.Tensor]:
    """The step as it runs fastest: on a GPU its kernels are compiled ahead, all at once, and it becomes a CUDA graph.

    `example()` are micro-batches to compile for: nothing is learned from them. `say` is told what is slower than it
    could be, and why.
    """
    if train_step.optimizer.flat.device.type != "cuda":
        return train_step
    if line := what_is_not_fused(train_step.unet.unwrap()):
        say(line)
    if reason := train_step.compile_kernels(example()):
        say(f"kernels are compiled as they first run, not all ahead: {reason}")
    return CapturedStep(train_step, say) if uses_cuda_graph else train_step


def training_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which all GPU work, ColossalAI's boosting included, goes to one stream that can be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
