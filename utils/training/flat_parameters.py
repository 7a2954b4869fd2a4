"""A module's parameters as views into one buffer each for weights and gradients."""

from typing import Any

import torch
from torch import Tensor

from utils.kernels import updates
from utils.kernels.rounding import round_
from utils.runtime.timing import mark
from utils.training import host_memory


class FlatParameters:
    """A module's trainable parameters as views into one buffer each for weights and gradients.

    Args:
        module: its parameters must be float32 (the file's own values); they become `weight_dtype` views.
        weight_dtype: dtype of the weights and gradients the network computes with.
        device: where all buffers live but those that are offloaded.
        memory_format: torch.channels_last lays out 4-D parameters so; others are contiguous.
        scattered_grads: leave each gradient where autograd, or with several ranks DDP, puts it (see
            kernels.adamw_scattered), instead of adding it into a buffer of zeros; without Triton the buffer.
        offload_optimizer: "moments", "all": those, or `master` too, are in pinned host memory, which needs
            host_memory.reaches_host_memory. Nothing on a CPU.

    `master` holds the float32 values as they were in the file, not their rounded cast; for float32 it is `weight`.
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
        num_elements = sum(p.numel() for _, p in self.parameters)
        self.moments_on_host = offload_optimizer != "none" and self.device.type == "cuda"
        on_host = offload_optimizer == "all" and weight_dtype != torch.float32
        self.master = host_memory.zeros(num_elements, torch.float32, self.device, on_host)
        for (_, parameter), view in zip(self.parameters, self.views(self.master), strict=True):
            view.copy_(parameter.detach())
        self.weight = self.master
        if weight_dtype != torch.float32:
            self.weight = torch.empty(num_elements, dtype=weight_dtype, device=self.device)
            self.round_weights(0)
        for (_, parameter), weight in zip(self.parameters, self.views(self.weight), strict=True):
            parameter.data = weight
        mark("weights placed")
        numels = [parameter.numel() for _, parameter in self.parameters]
        self.grad: Tensor | None = None
        self.grad_table: Any = updates.gradient_table(numels, device) if scattered_grads else None
        if self.grad_table is not None:
            return
        self.grad = torch.zeros(num_elements, dtype=weight_dtype, device=device)
        for (_, parameter), grad in zip(self.parameters, self.views(self.grad), strict=True):
            parameter.grad = grad

    def round_weights(self, num_updates: Tensor | int) -> None:
        """The weights become the masters as they are rounded after so many updates; nothing for float32."""
        if self.weight is not self.master:
            round_(self.weight, self.master, num_updates)

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
        shaped, start = [], 0
        for _, parameter in self.parameters:
            flat = buffer[start : start + parameter.numel()]
            start += parameter.numel()
            if parameter.dim() == 4 and self.memory_format == torch.channels_last:
                n, c, h, w = parameter.shape
                shaped.append(flat.view(n, h, w, c).permute(0, 3, 1, 2))
            else:
                shaped.append(flat.view(parameter.shape))
        return shaped

    def named(self, buffer: Tensor) -> list[tuple[str, Tensor]]:
        """(parameter name, view of its part of `buffer`) each: what a file of these parameters holds."""
        views = self.views(buffer.detach())
        return [(name, view) for (name, _), view in zip(self.parameters, views, strict=True)]

    def wait_for_device(self) -> None:
        """Waits until the GPU has written what it has been told to write: the host may read offloaded buffers then."""
        if self.moments_on_host:
            torch.cuda.synchronize(self.device)
