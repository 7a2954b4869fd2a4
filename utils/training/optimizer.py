"""AdamW on fp32 master weights for fp16 (or bf16, or fp32) parameters, as one ColossalAI OptimizerWrapper.

Why: docs/precision.md. Everything that one update decides (skip or apply, learning rate, loss scale) is held in
tensors on the device, so that a step never waits for the GPU and can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.kernels import operations
from utils.runtime.colossal import OptimizerWrapper
from utils.training.flat_parameters import FlatParameters
from utils.training.packed import EightBit, zero_buffer

GROWTH_INTERVAL = 2000  # applied updates in a row before the loss scale doubles (torch.amp.GradScaler's figure)
MIN_LOSS_SCALE = 2.0**-14


class MasterWeightsOptimizer(OptimizerWrapper):
    """AdamW with float32 master weights and moments, dynamic loss scale (float16 only) and gradient clipping.

    Args:
        parameters: the FlatParameters to train.
        learning_rates: lr of the first, second, ... applied update; the last one holds from there on.
        betas, eps, weight_decay: AdamW's.
        max_grad_norm: clip the unscaled gradient's 2-norm to this; 0 switches clipping off.
        initial_scale: first loss scale for float16 weights; other dtypes have none (it stays 1).
        use_8bit_adam: moments in 8 bits each.

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
        weight = torch.nn.Parameter(parameters.weight, requires_grad=False)
        super().__init__(
            torch.optim.AdamW([weight], lr=learning_rates[0], betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.flat = parameters
        device = parameters.device
        self.scales_loss = parameters.weight.dtype == torch.float16
        self.max_grad_norm = max_grad_norm
        self.growth_interval = growth_interval
        self.exp_avg, self.exp_avg_sq = (self._zeros(use_8bit_adam, signed) for signed in (True, False))
        self.learning_rates = torch.tensor(learning_rates, dtype=torch.float64, device=device)
        self.loss_scale = torch.tensor(initial_scale if self.scales_loss else 1.0, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)  # applied since the scale last changed
        self.num_applied = parameters.masters.num_updates
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._scaled_grad_norm = torch.zeros(1, device=device)
        self._constants = torch.tensor([*betas, eps, weight_decay], dtype=torch.float64, device=device)

    def _zeros(self, use_8bit_adam: bool, signed: bool) -> Tensor | EightBit:
        numel, device, on_host = self.flat.masters.numel, self.flat.device, self.flat.moments_on_host
        if use_8bit_adam:
            return EightBit.zeros(numel, signed=signed, device=device, on_host=on_host)
        return zero_buffer(numel, torch.float32, device, on_host)

    def backward(self, loss: Tensor, inputs: Any = None, retain_graph: bool = False, **kwargs: Any) -> None:
        """Adds the gradient of `loss` times the loss scale into the parameters' gradients."""
        (loss * self.loss_scale).backward(inputs=inputs, retain_graph=retain_graph, **kwargs)

    def sum_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's hook for a bucket of gradients that this rank has made: sums it over the ranks.

        Gradients without a buffer of their own stay in the bucket; from the next step on backward passes write there.
        """
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        if self.flat.grad is None:
            for parameter, values in zip(bucket.parameters(), bucket.gradients(), strict=True):
                setattr(parameter, operations.GRAD_PLACE, values.as_strided(parameter.shape, parameter.stride()))
        return work.get_future().then(lambda done: done.value()[0])

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """See FlatParameters.clear_grads."""
        self.flat.clear_grads()

    @torch.no_grad()
    def step(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Unscales, checks, clips and applies the gradients, then adapts the loss scale.

        Returns scalars on the device: `lr`, `grad_norm` (unscaled, before clipping), `loss_scale` (that this step's
        gradient was made with) and `skipped` (1.0 if the gradient was not finite).
        """
        loss_scale = self.loss_scale.clone()
        self._measure_grad_norm()
        grad_norm = self._scaled_grad_norm[0] / loss_scale
        finite = grad_norm < torch.inf  # not for NaN either
        # Not learning_rates[num_applied]: a tensor without dimensions as an index is read back by the host.
        lr = self.learning_rates.take(self.num_applied.clamp(max=len(self.learning_rates) - 1))
        self._update(lr, grad_norm, loss_scale, finite)
        skipped = ~finite
        self.num_applied += finite
        self.num_skipped += skipped
        if self.scales_loss:
            self.num_good.add_(1).mul_(finite)
            grow = self.num_good >= self.growth_interval
            self.loss_scale.mul_(torch.where(grow, 2.0, torch.where(finite, 1.0, 0.5))).clamp_(min=MIN_LOSS_SCALE)
            self.num_good.mul_(~grow)
        if self.flat.grad_table is not None and not torch.cuda.is_current_stream_capturing():
            self.flat.clear_grads()  # they would take memory beside those of the captured graph
        return dict(lr=lr, grad_norm=grad_norm, loss_scale=loss_scale, skipped=skipped.float())

    @torch.no_grad()
    def update_nothing(self) -> None:
        """An update that is not applied: its kernels are compiled by it (see kernels.ahead_of_time)."""
        self._measure_grad_norm()
        grad_norm = self._scaled_grad_norm[0]
        nothing = torch.zeros_like(grad_norm, dtype=torch.bool)
        self._update(self.learning_rates[:1], grad_norm, self.loss_scale, nothing)

    def _measure_grad_norm(self) -> None:
        if self.flat.grad_table is not None and not torch.cuda.is_current_stream_capturing():
            self.flat.bind_grads()
        operations.grad_norm_(self.flat.gradients, self._scaled_grad_norm)

    def _update(self, lr: Tensor, grad_norm: Tensor, loss_scale: Tensor, finite: Tensor) -> None:
        """Clips and applies the gradients if they are `finite`."""
        # In float64: a bias correction like 1 - 0.999 loses four digits in float32.
        corrections = 1 - self._constants[:2] ** (self.num_applied + 1)
        clip = (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm > 0 else 1.0
        number = self.num_applied + finite
        parts = [clip / loss_scale, lr, self._constants, corrections[0], corrections[1].sqrt(), finite, number]
        scalars = torch.cat([part.double().reshape(-1) for part in parts]).float()
        update: Any = operations.adamw_8bit_ if isinstance(self.exp_avg, EightBit) else operations.adamw_
        moments = self.exp_avg, self.exp_avg_sq
        update(self.flat.weight, self.flat.masters.remainder, self.flat.gradients, *moments, scalars)
