"""How much of fp32's training fp16 and bf16 keep on a real base, and which rounding loses the rest.

python -m bench.precision [--model DIR] [--photos DIR] [--steps 20 50] [--learning_rate 1e-6] [--ways NAME ...]
    [--device cpu] [--json FILE]

Every way makes the same draws and updates fp32 masters by the program's own optimizer. What is printed is the masters'
change against that of fp32: cosine, ratio of norms, and the largest difference of a loss. The ways whose name begins
with "only" compute in fp32 and round one kind of value to bf16's 8 bits, so that its share in the loss can be seen.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.command_line import EMBEDDED, PROMPT, make_parser, write_results
from utils.data.inputs import BatchSource, TrainingInputs, encode_inputs
from utils.dataset import InstanceDataset
from utils.diffusion import Loss, sample_latents
from utils.models import fused_unet, loading
from utils.models.folder import read_base
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer
from utils.training.train_step import predict


class Way(NamedTuple):
    """How one run computes: dtypes of the frozen parts and of the UNet, and what is rounded to bf16 besides."""

    frozen: torch.dtype = torch.float32
    unet: torch.dtype = torch.float32
    rounds_inputs: bool = False
    rounds_weights: Callable[[str, torch.nn.Parameter], bool] | None = None  # which, by name
    stochastic: bool = False
    rounds_activations: bool = False
    rounds_gradients: bool = False
    rounds_weight_gradients: bool = False


def stochastically_to_bf16(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One of the two nearest bf16 numbers, as fp32: the nearer the likelier, so that the mean is right."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32).to(values.device)
    return (values.contiguous().view(torch.int32) + noise & -65536).view(torch.float32)


def to_bf16(values: torch.Tensor) -> torch.Tensor:
    """The nearest bf16 numbers, as fp32."""
    return values.to(torch.bfloat16).float()


class _Rounding(torch.autograd.Function):
    """The identity, rounded to bf16 on the way forward, backward, or both."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, forward: bool, backward: bool) -> torch.Tensor:
        ctx.backward = backward
        return to_bf16(values) if forward else values.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (to_bf16(grad) if ctx.backward else grad), None, None


def round_between_modules(unet: torch.nn.Module, forward: bool, backward: bool) -> None:
    """Rounds what every module of the UNet hands on: convolutions, norms, blocks with their residuals."""

    def hook(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        return _Rounding.apply(output, forward, backward) if isinstance(output, torch.Tensor) else output

    for module in unet.modules():
        module.register_forward_hook(hook)


WAYS = {
    "fp16": Way(torch.float16, torch.float16),
    "bf16": Way(torch.bfloat16, torch.bfloat16),
    "bf16, photos and prompts encoded in fp32": Way(torch.float32, torch.bfloat16),
    "only photos and prompts encoded in bf16": Way(torch.bfloat16),
    "only inputs of the UNet rounded": Way(rounds_inputs=True),
    "only weights rounded": Way(rounds_weights=lambda name, weight: True),
    "only weights rounded, stochastically": Way(rounds_weights=lambda name, weight: True, stochastic=True),
    "only norms' weights and all biases rounded": Way(rounds_weights=lambda name, weight: weight.dim() == 1),
    "only the time embedding's weights rounded": Way(rounds_weights=lambda name, weight: "time_emb" in name),
    "only conv_in and conv_out rounded": Way(rounds_weights=lambda name, weight: name.startswith("conv_")),
    "only convolutions in between rounded": Way(
        rounds_weights=lambda name, weight: weight.dim() == 4 and not name.startswith("conv_")
    ),
    "only linear layers in between rounded": Way(
        rounds_weights=lambda name, weight: weight.dim() == 2 and "time_emb" not in name
    ),
    "only activations rounded": Way(rounds_activations=True),
    "only gradients of activations rounded": Way(rounds_gradients=True),
    "only gradients of weights rounded": Way(rounds_weight_gradients=True),
    "all of the four rounded": Way(
        rounds_inputs=True, rounds_weights=lambda name, weight: True, rounds_activations=True, rounds_gradients=True
    ),
}


def encode(model: Path, photos: Path, resolution: int, dtype: torch.dtype, device: torch.device) -> TrainingInputs:
    dataset = InstanceDataset(photos, resolution, prompt=PROMPT)
    nothing_to_draw = dict(shown=[], drawing={})
    options = dict(tokenizer_name=None, seed=0, num_samples=1) | nothing_to_draw
    return encode_inputs(read_base(model), dataset, None, dtype, device, **options)


def train(
    unet: torch.nn.Module, inputs: TrainingInputs, way: Way, *, steps: list[int], learning_rate: float, batch_size: int
) -> Iterator[tuple[torch.Tensor, list[float]]]:
    """At each of `steps`: the change of the masters [N] until then, and all losses so far."""
    unet = copy.deepcopy(unet)
    device = inputs.encoder_hidden_states.device
    flat = FlatParameters(unet, way.unet, device)
    if device.type == "cuda" and way.unet != torch.float32:
        fused_unet.install(unet)
    if way.rounds_activations or way.rounds_gradients:
        round_between_modules(unet, way.rounds_activations, way.rounds_gradients)
    optimizer = MasterWeightsOptimizer(flat, learning_rates=[learning_rate])
    spread = dict(num_ranks=1, batch_size=batch_size, num_micro_batches=1)
    batches = BatchSource(inputs, seed=0, rank=0, noise_offset=0.0, device=device, **spread)
    before, losses = flat.masters.unpack().clone(), []
    for step in range(steps[-1]):
        losses.append(one_step(unet, inputs, batches, optimizer, way, step))
        if step + 1 in steps:
            yield flat.masters.unpack() - before, list(losses)


def one_step(
    unet: torch.nn.Module,
    inputs: TrainingInputs,
    batches: BatchSource,
    optimizer: MasterWeightsOptimizer,
    way: Way,
    step: int,
) -> float:
    """The program's step, with the roundings of `way`; returns its loss."""
    flat = optimizer.flat
    (batch,) = batches.micro_batches(step)
    latents = sample_latents(batch.latent_mean, batch.latent_std, batch.latent_noise, inputs.scaling_factor)
    table = inputs.encoder_hidden_states.to(way.unet)
    if way.rounds_inputs:
        table = to_bf16(table)
    exact = flat.weight.clone() if way.rounds_weights else None
    if way.rounds_weights:
        for name, weight in flat.parameters:
            if way.rounds_weights(name, weight):
                generator = torch.Generator().manual_seed(step * 1000 + 7)
                weight.data.copy_(
                    stochastically_to_bf16(weight.data, generator) if way.stochastic else to_bf16(weight.data)
                )
    optimizer.zero_grad()
    model_pred, target = predict(
        unet, inputs._replace(encoder_hidden_states=table), latents, batch.noise, batch.timesteps, batch.prompt_rows
    )
    loss = Loss(inputs.noise_scheduler, latents.device).mean(model_pred, target)
    optimizer.backward(loss)
    if exact is not None:
        flat.weight.copy_(exact)
    if way.rounds_weight_gradients:
        flat.grad.copy_(to_bf16(flat.grad))
    optimizer.step()
    return loss.item()


def compare(change: torch.Tensor, losses: list[float], expected: torch.Tensor, expected_losses: list[float]) -> dict:
    cosine = torch.nn.functional.cosine_similarity(change.double(), expected.double(), dim=0)
    return dict(
        cosine=cosine.item(),
        norm_ratio=(change.norm() / expected.norm()).item(),
        loss_difference=max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
    )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "bench.precision", photos=True)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="a pipeline folder")
    parser.add_argument("--resolution", type=int, default=64, help="of the photos, in pixels")
    parser.add_argument("--batch_size", type=int, default=1, help="photos a step")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50], help="after which to compare")
    parser.add_argument("--learning_rate", type=float, default=1e-6, help="of every step")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="these alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(argv)
    device, steps = torch.device(args.device), sorted(args.steps)
    unet = loading.load_unet(read_base(args.model)).to(device)
    dtypes = {torch.float32} | {WAYS[name].frozen for name in args.ways}
    inputs = {dtype: encode(args.model, args.photos, args.resolution, dtype, device) for dtype in dtypes}
    options = dict(steps=steps, learning_rate=args.learning_rate, batch_size=args.batch_size)
    expected = list(train(unet, inputs[torch.float32], Way(), **options))
    rows = []
    for name in args.ways:
        way = WAYS[name]
        for step, result, reference in zip(
            steps, train(unet, inputs[way.frozen], way, **options), expected, strict=True
        ):
            rows.append(dict(way=name, steps=step, **compare(*result, *reference)))
            print(
                f"{name:45} {step:4} steps  cosine {rows[-1]['cosine']:.6f}  norm ratio "
                f"{rows[-1]['norm_ratio']:.4f}  loss difference {rows[-1]['loss_difference']:.5f}",
                flush=True,
            )
    write_results(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
