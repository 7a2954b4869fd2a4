"""A module's parameters as views into one buffer each for weights and gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from utils.kernels import operations
from utils.runtime.process import mark
from utils.training.packed import Masters, zero_buffer


class Anew:
    """What a function goes through, from its beginning whenever it is iterated: one value at a time is in memory."""

    def __init__(self, values: Callable[[], Iterable[Any]]):
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values())


class FlatParameters:
    """A module's trainable parameters as views into one buffer each for weights and gradients.

    Args:
        module: its parameters must be float32 (the file's own values); they become `weight_dtype` views.
        weight_dtype: dtype of the weights and gradients the network computes with.
        device: where all buffers live but those that are offloaded.
        memory_format: torch.channels_last lays out 4-D parameters so; others are contiguous.
        scattered_grads: leave each gradient where autograd, or with several ranks DDP, puts it (see
            kernels.adamw.GradientTable), instead of adding it into a buffer of zeros; without Triton the buffer.
        offload_optimizer: "moments", "all": those, or what masters take beside the weights too, are in pinned host
            memory, where packed.host_memory_problem finds none. Nothing on a CPU.

    `masters` holds the float32 values as they were in the file, not their rounded cast.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        weight_dtype: torch.dtype,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.contiguous_format,
        scattered_grads: bool = False,
        offload_optimizer: str = "none",
    ):
        self.parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.memory_format = memory_format
        self.device = torch.device(device)
        numels = [parameter.numel() for _, parameter in self.parameters]
        num_elements = sum(numels)
        self.moments_on_host = offload_optimizer != "none" and self.device.type == "cuda"
        self.weight = torch.empty(num_elements, dtype=weight_dtype, device=self.device)
        remainder = None
        if weight_dtype != torch.float32:
            remainder = zero_buffer(num_elements, torch.int16, self.device, offload_optimizer == "all")
        num_updates = torch.zeros((), dtype=torch.int64, device=self.device)
        self.masters = Masters(self.weight, remainder, num_updates)
        scratch = torch.empty(max(numels), device=self.device)
        for piece, (_, parameter) in self._pieces():
            values = scratch[: parameter.numel()]
            self._shaped(values, parameter).copy_(parameter.detach())
            self.masters[piece].pack_(values)
            parameter.data = self._shaped(self.weight[piece], parameter)
        mark("weights placed")
        self.grad: Tensor | None = None
        self.grad_table: Any = operations.gradient_table(numels, weight_dtype, device) if scattered_grads else None
        if self.grad_table is not None:
            return
        self.grad = torch.zeros(num_elements, dtype=weight_dtype, device=device)
        for (_, parameter), grad in zip(self.parameters, self.views(self.grad), strict=True):
            parameter.grad = grad

    @property
    def gradients(self) -> Any:
        """As kernels.operations takes them: the buffer, or the table of where they lie."""
        return self.grad if self.grad_table is None else self.grad_table

    def norm(self) -> float:
        """The weights' Euclidean norm, to be compared with an earlier one: on a CPU its fp32 sum is too small."""
        return torch.linalg.vector_norm(self.weight, dtype=torch.float32).item()

    def clear_grads(self) -> None:
        """No gradient: zeros in the buffer, or none at all where autograd makes them anew."""
        if self.grad is not None:
            self.grad.zero_()
        else:
            for _, parameter in self.parameters:
                parameter.grad = None

    def bind_grads(self) -> None:
        """Tells the table where the gradients lie; after a capture once, for all replays. Not part of a graph."""
        self.grad_table.set_addresses([parameter.grad for _, parameter in self.parameters])

    def views(self, buffer: Tensor) -> list[Tensor]:
        """`buffer` [num_elements] cut into tensors of the parameters' shapes and memory format, without copying."""
        return [self._shaped(buffer[piece], parameter) for piece, (_, parameter) in self._pieces()]

    def _pieces(self) -> Iterator[tuple[slice, tuple[str, torch.nn.Parameter]]]:
        """Which part of a buffer is whose."""
        start = 0
        for name, parameter in self.parameters:
            yield slice(start, start + parameter.numel()), (name, parameter)
            start += parameter.numel()

    def _shaped(self, flat: Tensor, parameter: Tensor) -> Tensor:
        return operations.shaped(flat, parameter, self.memory_format)

    def named(self, buffer: Tensor) -> list[tuple[str, Tensor]]:
        """(parameter name, view of its part of `buffer`) each: what a file of these parameters holds."""
        return [(name, self._shaped(buffer[piece], parameter)) for piece, (name, parameter) in self._pieces()]

    def named_masters(self) -> Iterable[tuple[str, Tensor]]:
        """(parameter name, its float32 masters) each, computed on the way unless they are the weights."""
        return self.named(self.weight) if self.masters.remainder is None else Anew(self._each_master)

    def _each_master(self) -> Iterator[tuple[str, Tensor]]:
        for piece, (name, parameter) in self._pieces():
            values = torch.empty(parameter.numel(), device=self.device)
            self.masters[piece].read_into(values, self.device)
            yield name, self._shaped(values, parameter)

    def wait_for_device(self) -> None:
        """Waits until the GPU has written what it has been told to write: the host may read offloaded buffers then."""
        if self.moments_on_host:
            torch.cuda.synchronize(self.device)
