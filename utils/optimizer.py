"""AdamW on fp32 master weights for fp16 (or bf16, or fp32) parameters, as one ColossalAI OptimizerWrapper.

Why: docs/precision.md. Everything that one update decides (skip or apply, learning rate, loss scale) is held in
tensors on the device, so that a step never waits for the GPU and can be captured in a CUDA graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils import host_memory, kernels
from utils.colossal import OptimizerWrapper
from utils.eight_bit import EightBit
from utils.timing import mark

GROWTH_INTERVAL = 2000  # applied updates in a row before the loss scale doubles (torch.amp.GradScaler's figure)
MIN_LOSS_SCALE = 2.0**-14


def learning_rate_table(
    lr: float, lr_scheduler: str, *, num_warmup_steps: int, num_training_steps: int, num_cycles: int, power: float
) -> list[float]:
    """The learning rate of each of `num_training_steps` updates, by diffusers' schedule of that name."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_scheduler(
        lr_scheduler,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        power=power,
    )
    table = []
    for _ in range(num_training_steps):
        table.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return table


class FlatParameters:
    """A module's trainable parameters as views into one buffer each for weights and gradients.

    Args:
        module: its parameters must be float32 (the file's own values); they become `weight_dtype` views.
        weight_dtype: dtype of the weights and gradients the network computes with.
        device: where all buffers live but those that are offloaded.
        memory_format: torch.channels_last lays out 4-D parameters so; others are contiguous.
        scattered_grads: leave each gradient where autograd, or with several ranks DDP, puts it (see
            kernels_scattered), instead of adding it into a buffer of zeros; without Triton the buffer.
        offload_optimizer: "moments", "all": those, or `master` too, are in pinned host memory, which needs
            kernels.reaches_host_memory. Nothing on a CPU.

    `master` holds the float32 values as they were in the file, not their rounded cast; for float32 it is `weight`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        weight_dtype: torch.dtype,
        device,
        memory_format=torch.contiguous_format,
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
        self.weight = self.master if weight_dtype == torch.float32 else self.master.to(self.device, weight_dtype)
        for (_, parameter), weight in zip(self.parameters, self.views(self.weight), strict=True):
            parameter.data = weight
        mark("weights placed")
        numels = [parameter.numel() for _, parameter in self.parameters]
        self.grad, self.grad_table = None, kernels.gradient_table(numels, device) if scattered_grads else None
        if self.grad_table is not None:
            return
        self.grad = torch.zeros(num_elements, dtype=weight_dtype, device=device)
        for (_, parameter), grad in zip(self.parameters, self.views(self.grad), strict=True):
            parameter.grad = grad

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

    def settle(self) -> None:
        """Waits until the GPU has written what it has been told to write: the host may read offloaded buffers then."""
        if self.moments_on_host:
            torch.cuda.synchronize(self.device)


class MasterWeightsOptimizer(OptimizerWrapper):
    """AdamW with float32 master weights and moments, dynamic loss scale (float16 only) and gradient clipping.

    Args:
        parameters: the FlatParameters to train.
        learning_rates: lr of the first, second, ... applied update; the last one holds from there on.
        betas, eps, weight_decay: AdamW's.
        max_grad_norm: clip the unscaled gradient's 2-norm to this; 0 switches clipping off.
        initial_scale: first loss scale for float16 weights; other dtypes have none (it stays 1).
        use_8bit_adam: moments in 8 bits each; needs gradients in a buffer.

    A gradient with an inf or NaN is not applied: it halves the scale, counts in `num_skipped`, and does not advance
    the learning-rate schedule.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        learning_rates: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        initial_scale: float = 2.0**16,
        growth_interval: int = GROWTH_INTERVAL,
        use_8bit_adam: bool = False,
    ):
        assert not (use_8bit_adam and parameters.grad is None)
        master = torch.nn.Parameter(parameters.master, requires_grad=False)
        options = dict(lr=learning_rates[0], betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(torch.optim.AdamW([master], **options))
        self.flat = parameters
        device = parameters.device
        self.scales_loss = parameters.weight.dtype == torch.float16
        self.max_grad_norm = max_grad_norm
        self.growth_interval = growth_interval
        self.exp_avg, self.exp_avg_sq = self._zero_moments(use_8bit_adam)
        self.learning_rates = torch.tensor(learning_rates, dtype=torch.float64, device=device)
        self.loss_scale = torch.tensor(initial_scale if self.scales_loss else 1.0, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)  # applied since the scale last changed
        self.num_applied = torch.zeros((), dtype=torch.int64, device=device)
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._scaled_grad_norm = torch.zeros(1, device=device)
        self._betas = torch.tensor(betas, dtype=torch.float64, device=device)
        self._constants = torch.tensor([*betas, eps, weight_decay], dtype=torch.float64, device=device)

    def _zero_moments(self, use_8bit_adam: bool) -> tuple:
        numel, where = self.flat.master.numel(), dict(device=self.flat.device, on_host=self.flat.moments_on_host)
        if use_8bit_adam:
            return EightBit.zeros(numel, signed=True, **where), EightBit.zeros(numel, signed=False, **where)
        return tuple(host_memory.zeros(numel, torch.float32, **where) for _ in range(2))

    def backward(self, loss: Tensor, inputs=None, retain_graph: bool = False, **kwargs) -> None:
        """Adds the gradient of `loss` times the loss scale into the parameters' gradients."""
        (loss * self.loss_scale).backward(inputs=inputs, retain_graph=retain_graph, **kwargs)

    def zero_grad(self, *args, **kwargs) -> None:
        """See FlatParameters.clear_grads."""
        self.flat.clear_grads()

    @torch.no_grad()
    def step(self, *args, **kwargs) -> dict[str, Tensor]:
        """Unscales, checks, clips and applies the gradients, then adapts the loss scale.

        Returns scalars on the device: `lr`, `grad_norm` (unscaled, before clipping), `loss_scale` (that this step's
        gradient was made with) and `skipped` (1.0 where the gradient was not finite).
        """
        loss_scale = self.loss_scale.clone()
        self._measure_grad_norm()
        grad_norm = self._scaled_grad_norm[0] / loss_scale
        finite = torch.isfinite(grad_norm)
        # Not learning_rates[num_applied]: a tensor without dimensions as an index is read back by the host.
        lr = self.learning_rates.take(self.num_applied.clamp(max=len(self.learning_rates) - 1))
        self._update(self._scalars(lr, grad_norm, loss_scale, finite))
        self._count(finite)
        if self.flat.grad_table is not None and not torch.cuda.is_current_stream_capturing():
            self.flat.clear_grads()  # else they would be there beside those of the captured graph
        return dict(lr=lr, grad_norm=grad_norm, loss_scale=loss_scale, skipped=(~finite).float())

    @torch.no_grad()
    def rehearse(self) -> None:
        """An update that is not applied, for utils.rehearsal."""
        self._measure_grad_norm()
        grad_norm = self._scaled_grad_norm[0]
        self._update(self._scalars(self.learning_rates[:1], grad_norm, self.loss_scale, torch.zeros_like(grad_norm)))

    def _measure_grad_norm(self) -> None:
        if self.flat.grad_table is None:
            kernels.grad_norm_(self.flat.grad, self._scaled_grad_norm)
            return
        if not torch.cuda.is_current_stream_capturing():
            self.flat.bind_grads()
        self.flat.grad_table.grad_norm_(self.flat.weight.dtype, self._scaled_grad_norm)

    def _update(self, scalars: Tensor) -> None:
        weight = None if self.flat.weight is self.flat.master else self.flat.weight
        state = (self.flat.master, self.exp_avg, self.exp_avg_sq)
        if self.flat.grad_table is not None:
            self.flat.grad_table.adamw_(weight, self.flat.weight.dtype, *state, scalars)
            return
        update = kernels.adamw_8bit_ if isinstance(self.exp_avg, EightBit) else kernels.adamw_
        update(weight, self.flat.grad, *state, scalars)

    def _scalars(self, lr: Tensor, grad_norm: Tensor, loss_scale: Tensor, finite: Tensor) -> Tensor:
        """The `scalars` of kernels.adamw_; bias corrections in float64: 1 - 0.999 loses four digits in float32."""
        corrections = 1 - self._betas ** (self.num_applied + 1)
        grad_scale = 1 / loss_scale
        if self.max_grad_norm > 0:
            grad_scale = grad_scale * (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        parts = [grad_scale, lr, self._constants, corrections[0], corrections[1].sqrt(), finite]
        return torch.cat([part.double().reshape(-1) for part in parts]).float()

    def _count(self, finite: Tensor) -> None:
        applied = finite.long()
        self.num_applied += applied
        self.num_skipped += 1 - applied
        if self.scales_loss:
            self.num_good.add_(1).mul_(applied)
            grow = self.num_good >= self.growth_interval
            self.loss_scale.mul_(torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(min=MIN_LOSS_SCALE)
            self.num_good.mul_((~grow).long())
