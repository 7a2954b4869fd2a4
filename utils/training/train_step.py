"""One optimisation step, as the method reads: noise, prediction, target, loss, update; and as one CUDA graph."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from utils.data.inputs import MicroBatch, TrainingInputs
from utils.diffusion import Loss, sample_latents, training_target
from utils.errors import first_line
from utils.kernels.ahead_of_time import compile_ahead
from utils.models.fused_unet import what_is_not_fused
from utils.runtime.colossal import sum_vectors
from utils.runtime.process import mark
from utils.training.optimizer import MasterWeightsOptimizer

WARM_UP_STEPS = 3  # eager steps before the capture: libraries choose algorithms, kernels are compiled
DDP_WARM_UP_STEPS = 12  # DistributedDataParallel rebuilds its buckets and measures itself during its first eleven
METRICS = ("loss", "lr", "grad_norm", "loss_scale", "skipped", "instance_loss", "class_loss")


def predict(
    unet: torch.nn.Module,
    inputs: TrainingInputs,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet predicts of noisy latents, in its dtype, and what it should, float32: [B,4,h,w] each.

    Args:
        latents, noise: float32 [B,4,h,w].
        timesteps, prompt_rows: int64 [B]; rows are of inputs.encoder_hidden_states.
    """
    noisy_latents = inputs.noise_scheduler.add_noise(latents, noise, timesteps)
    encoder_hidden_states = inputs.encoder_hidden_states.index_select(0, prompt_rows)
    weight_dtype = encoder_hidden_states.dtype
    model_pred = unet(noisy_latents.to(weight_dtype), timesteps, encoder_hidden_states, return_dict=False)[0]
    return model_pred, training_target(inputs.noise_scheduler, latents, noise, timesteps)


class TrainStep:
    """The eager definition of a step, of what is boosted: forward and backward of every micro-batch, one update."""

    def __init__(self, unet: Any, optimizer: MasterWeightsOptimizer, booster: Any, inputs: TrainingInputs, loss: Loss):
        self.unet, self.optimizer, self.booster = unet, optimizer, booster
        self.inputs, self.loss = inputs, loss
        self.num_ranks = dist.get_world_size()

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Trains on the micro-batches; returns float64 [7] on the device: what METRICS names."""
        self.optimizer.zero_grad()
        shares, num_shares = [], len(micro_batches) * self.num_ranks
        for number, batch in enumerate(micro_batches, 1):
            reduces = self.num_ranks > 1 and number == len(micro_batches)  # the ranks' gradients, once a step
            with contextlib.nullcontext() if reduces else self.booster.no_sync(self.unet, self.optimizer):
                shares.append(self._forward_backward(batch, num_shares))
        losses = torch.stack(shares).sum(0)
        if self.num_ranks > 1:
            sum_vectors(self.unet)
            dist.all_reduce(losses)
        loss, instance_loss, class_loss = losses.unbind()
        update = self.optimizer.step()
        metrics = dict(loss=loss, instance_loss=instance_loss, class_loss=class_loss, **update)
        return torch.stack([metrics[name].double() for name in METRICS])

    def _forward_backward(self, batch: MicroBatch, num_shares: int) -> torch.Tensor:
        """Returns this micro-batch's share of the loss, the photos' loss and the class images' loss, [3].

        The step's loss is the mean over so many micro-batches, of all ranks: shares and gradients are to be summed.
        """
        inputs = self.inputs
        latents = sample_latents(batch.latent_mean, batch.latent_std, batch.latent_noise, inputs.scaling_factor)
        model_pred, target = predict(self.unet, inputs, latents, batch.noise, batch.timesteps, batch.prompt_rows)
        losses = self.loss(model_pred, target, batch.timesteps)
        self.booster.backward(losses[0] / num_shares, self.optimizer)
        return torch.stack(losses).detach() / num_shares

    def compile_kernels(self, micro_batches: list[MicroBatch]) -> str | None:
        """Compiles the step's kernels, lets the libraries choose theirs, and changes nothing; returns why not."""

        def without_a_trace() -> None:
            self.optimizer.zero_grad()
            with self.booster.no_sync(self.unet, self.optimizer):
                self._forward_backward(micro_batches[0], len(micro_batches))
            self.optimizer.update_nothing()

        reason = compile_ahead(without_a_trace)
        self.optimizer.zero_grad()
        mark("kernels compiled")
        return reason


class CapturedStep:
    """A TrainStep whose every operation is captured in one CUDA graph after a few eager steps, then replayed.

    The eager step is the definition: the graph runs the same kernels on the same buffers, only without the host
    launching each. Everything must run on one stream that is not the default one (see `training_stream`). `say` is
    told, in one line, why the steps stay eager if the capture fails.
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
                target.copy_(source, non_blocking=True)
        assert self._graph is not None and self._metrics is not None
        self._graph.replay()
        return self._metrics

    def _capture(self, micro_batches: list[MicroBatch]) -> None:
        self._inputs = [MicroBatch(*map(torch.clone, batch)) for batch in micro_batches]
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
