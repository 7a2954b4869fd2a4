"""Compiles every Triton kernel that the program launches for each architecture of GPU, without a GPU.

python -m bench.kernel_targets [--targets 75 80 86 89 90 100 120] [--dtypes fp16 bf16 fp32] [--small] [--json FILE]

Triton's wheel brings NVIDIA's assembler. A stand-in for the driver names the architecture; the UNet's forward and
backward pass, the updates and the sampling run on the meta device, and each launch becomes a compilation. Stable
Diffusion v1's UNet at 512 pixels: training with batches of 1, 2, 8 and 16 (class images double 1 and 8), plain and
with gradient checkpointing, updates in 8 bits and not; sampling 1, 4 and 8 images with guidance. Accumulated gradients
and offloaded updates launch the same kernels. --small: a small UNet, training with a batch of 1, and each kernel as it
is launched first.

For each architecture and dtype: how many variants, the most registers a thread, bytes of spilled registers, and bytes
of shared memory, against what the architecture has. 1 if one of them does not compile or does not fit.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.command_line import ROOT, make_parser, write_results
from bench.random_sd14 import UNET_CONFIG

TRITON_FOLDER = Path(sys.prefix) / "triton"  # setup.sh --dev puts it there, off the path
DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16, fp32=torch.float32)
# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_MEMORY = {target: size * 1024 for target, size in SHARED_MEMORY.items()}
MAX_REGISTERS = 255  # of a thread
REGISTER_FILE = 65536  # of a block
TRAINING_BATCHES = (1, 2, 8, 16)
SAMPLING_BATCHES = (2, 8, 16)  # images with guidance
SMALL_UNET = dict(
    sample_size=8,
    block_out_channels=(32,),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=4,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)


class Variant(NamedTuple):
    """A compiled kernel: registers a thread, bytes of spilled registers a thread, bytes of shared memory a block."""

    kernel: str
    num_warps: int
    registers: int
    spilled: int
    shared: int


class StandIn:
    """The part of Triton's driver that a compilation asks; the device's number is its compute capability."""

    launcher_cls = staticmethod(lambda *_, **__: lambda *_, **__: None)

    class utils:
        """Of the driver's own functions, those that a compilation calls."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """As much shared memory as the architecture has."""
            return dict(max_shared_mem=SHARED_MEMORY[device], multiprocessor_count=80, warpSize=32)

    def __init__(self, target: int):
        self.target = target

    def get_current_device(self) -> int:
        """The compute capability, so that Triton keeps what it compiled for each apart."""
        return self.target

    def get_current_target(self) -> Any:
        """Triton's name for it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_stream(self, device: int = 0) -> int:
        """Nothing is launched."""
        return 0


def is_launched(kernel: Any, target: int) -> bool:
    """Whether the program launches a kernel there."""
    from utils.kernels import short_attention

    return kernel is not short_attention._short_attention_backward or divmod(target, 10) >= short_attention.OLDEST


Launch = tuple[Any, tuple, dict]  # kernel, arguments, keywords


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches of Triton's kernels are only noted, and tensors on the meta device count as a GPU's."""
    from triton.runtime.jit import JITFunction

    from utils.kernels import operations

    launches: list[Launch] = []

    def note(kernel, *args, **kwargs):
        launches.append((kernel, args, kwargs))

    def runs_on_meta(x: torch.Tensor) -> bool:
        return x.dtype in DTYPES.values() and x.numel() > 0

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", note))
        stack.enter_context(mock.patch.object(operations, "runs_triton", runs_on_meta))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        yield launches


def compile_launches(target: int, launches: list[Launch]) -> tuple[dict[str, Any], dict[str, str]]:
    """The kernels compiled for `target` by their hash, and the first line of each error by the kernel's name."""
    import triton

    triton.runtime.driver.set_active(StandIn(target))
    compiled: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for kernel, args, kwargs in launches:
        if not is_launched(kernel, target):
            continue
        try:
            found = kernel.run(*args, **kwargs | dict(warmup=True))
            compiled[found.hash] = found
        except Exception as error:  # whatever the compiler ends with is what is asked for here
            errors[kernel.__name__] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return compiled, errors


def inputs_of(unet: Any, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and prompts on the meta device."""
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.empty(batch, 4, side, side, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    timesteps = torch.empty(batch, device="meta", dtype=torch.int64)
    return latents, timesteps, torch.empty(batch, 77, width, device="meta", dtype=dtype)


def train(config: dict, dtype: torch.dtype, batches: tuple[int, ...], *, checkpoints: bool, eight_bit: bool) -> None:
    """The launches of training steps, as utils.training.build makes their parts."""
    from diffusers import UNet2DConditionModel

    from utils.models import fused_unet
    from utils.training.build import enable_gradient_checkpointing
    from utils.training.flat_parameters import FlatParameters
    from utils.training.optimizer import MasterWeightsOptimizer

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).train()
    if checkpoints:
        enable_gradient_checkpointing(unet)
    flat = FlatParameters(unet, dtype, "meta", torch.channels_last, scattered_grads=True)
    fused_unet.install(unet)
    optimizer = MasterWeightsOptimizer(flat, learning_rates=[1e-6], use_8bit_adam=eight_bit)
    for batch in batches:
        optimizer.zero_grad()
        optimizer.backward(unet(*inputs_of(unet, batch, dtype), return_dict=False)[0].float().square().mean())
        optimizer.update_nothing()


def sample(config: dict, dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    """The launches of a captured UNet, with guidance: as utils.models.captured_unet calls it."""
    from diffusers import UNet2DConditionModel

    from utils.models import fused_unet

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(dtype).to(memory_format=torch.channels_last).eval()
    fused_unet.install(unet, equal_halves=True)
    with torch.no_grad():
        for batch in batches:
            unet(*inputs_of(unet, batch, dtype), return_dict=False)


def launches_of(dtype: torch.dtype, is_small: bool) -> list[Launch]:
    """Every launch of the program with a UNet in `dtype`: they are the same for every target."""
    from utils.kernels.adamw import add_one_

    with recording() as launches:
        if is_small:
            train(SMALL_UNET, dtype, (1,), checkpoints=False, eight_bit=False)
            return list({id(launch[0]): launch for launch in reversed(launches)}.values())  # the first of each kernel
        train(UNET_CONFIG, dtype, TRAINING_BATCHES, checkpoints=False, eight_bit=False)
        train(UNET_CONFIG, dtype, TRAINING_BATCHES[:1], checkpoints=True, eight_bit=True)
        sample(UNET_CONFIG, dtype, SAMPLING_BATCHES)
        add_one_(torch.empty(256, device="meta"))  # the checks' question: does a kernel reach the host's memory?
    return launches


def resources(kernel: Any, folder: Path) -> Variant:
    """What the assembler gave a compiled kernel, by cuobjdump, which Triton's wheel brings."""
    from triton import knobs

    cubin = folder / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    spilled = found["STACK"] + found["LOCAL"]
    metadata = kernel.metadata
    return Variant(metadata.name, metadata.num_warps, found["REG"], spilled, max(metadata.shared, found["SHARED"]))


LAUNCHES: dict[str, list[Launch]] = {}  # by dtype; processes forked from this one inherit them


def compile_for(target: int, dtype: str) -> dict[str, Any]:
    """A row of the table, in a forked process."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # nothing compiled earlier, and nothing left behind
        compiled, errors = compile_launches(target, LAUNCHES[dtype])
        variants = [resources(kernel, Path(folder)) for kernel in compiled.values()]
    return dict(
        target=target,
        dtype=dtype,
        variants=[variant._asdict() for variant in variants],
        problems=[*(f"{name}: {line}" for name, line in errors.items()), *problems(target, variants)],
        seconds=round(time.perf_counter() - start, 1),
    )


def problems(target: int, variants: list[Variant]) -> list[str]:
    """A line for each variant that `target` cannot run."""
    found = []
    for variant in variants:
        if variant.shared > SHARED_MEMORY[target]:
            found.append(f"{variant.kernel}: {variant.shared} bytes of shared memory, {SHARED_MEMORY[target]} there")
        if variant.registers > MAX_REGISTERS or variant.registers * 32 * variant.num_warps > REGISTER_FILE:
            found.append(f"{variant.kernel}: {variant.registers} registers in {variant.num_warps} warps")
    return found if variants else ["nothing was compiled"]


def as_line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    variants = row["variants"]
    most = {name: max((each[name] for each in variants), default=0) for name in ("registers", "spilled", "shared")}
    cells = [f"sm_{row['target']}", row["dtype"], len(variants), *most.values(), f"{row['seconds']:.0f}"]
    return f"| {' | '.join(map(str, cells))} | {'; '.join(row['problems']) or 'ok'} |"


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 if something does not compile or fit."""
    parser = make_parser(__doc__, __spec__.name)
    targets = dict(type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY), metavar="CAPABILITY")
    parser.add_argument("--targets", **targets, help="compute capabilities: 75 80 86 89 90 100 120 (all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="the UNet's dtypes (all)")
    parser.add_argument("--small", action="store_true", help="a small UNet, one training step, each kernel once")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled
    if find_spec("triton") is None:  # again, with Triton on the path
        assert TRITON_FOLDER.exists(), "bash setup.sh --dev installs Triton for this"
        environment = os.environ | dict(PYTHONPATH=str(TRITON_FOLDER))
        command = [sys.executable, "-m", "bench.kernel_targets", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    LAUNCHES.update({dtype: launches_of(DTYPES[dtype], args.small) for dtype in args.dtypes})
    return print_table(args)


def print_table(args: argparse.Namespace) -> int:
    """A row for each target and dtype, compiled by `args.jobs` processes."""
    print("| target | dtype | variants | registers | spilled bytes | shared bytes | seconds | |\n|" + "---|" * 8)
    pairs = [(target, dtype) for target in args.targets for dtype in args.dtypes]
    results: dict[str, Any] = dict(triton=version("triton"), torch=torch.__version__, rows=[])
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as executor:
        for row in executor.map(compile_for, *zip(*pairs, strict=True)):
            results["rows"].append(row)
            print(as_line(row), flush=True)
            write_results(results, args.json)
    return int(any(row["problems"] for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
