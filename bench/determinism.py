"""Which kernels of a training step give the same bits every time, what it costs to switch to those that do.

python -m bench.determinism [--small] [--device cpu] [--json FILE]

On Stable Diffusion v1.4's shape (random weights, fp16, channels_last, 64x64 latents, batch 1), in a process of its own
for each setting, since cuBLAS reads its variable once:
- default; warn_only: cuDNN's and torch's switches as warnings; flag: what --deterministic sets;
- the gradients of five more forward and backward passes against the first one's;
- each kind of operation by itself at the UNet's shapes;
- a whole step captured in a CUDA graph, replayed twice, and run eagerly twice, from the same state: do the bits agree?
- milliseconds of forward and backward and of the captured step, medians by device events.
--small: a UNet that a CPU can take.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.command_line import make_parser
from bench.random_sd14 import UNET_CONFIG
from bench.studies.determinism_operations import cases, differ, differing
from bench.timing import median_ms
from utils.runtime.determinism import CUBLAS_CHOICES, CUBLAS_VARIABLE, deterministic_kernels

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("default", "warn_only", "flag")
SMALL_CONFIG = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=4,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
REPEATS = 5
SHOWN = 12  # names of parameters


@contextlib.contextmanager
def setting(name: str):
    """The switches of one of SETTINGS; cuBLAS's variable must be in the environment already for warn_only."""
    if name == "warn_only":
        torch.backends.cudnn.deterministic = True
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    with deterministic_kernels(name == "flag"):
        yield
    if name == "warn_only":
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def measure(name: str, device: torch.device, small: bool) -> dict:
    """Everything under one setting; the process group must be up."""
    from utils.training.captured_step import training_stream

    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    config = SMALL_CONFIG if small else UNET_CONFIG
    with setting(name), training_stream(device):
        step, batch = make_step(config, device, dtype)
        found = dict(setting=name, dtype=str(dtype), unet=guarded(compare_gradients, step, batch, device))
        say(name, "UNet done")
        if device.type == "cuda":
            found["graph"] = guarded(compare_with_graph, step, batch, device)
            say(name, "graph done")
            del step
            torch.cuda.empty_cache()
        found["operations"] = []
        for case in cases(config, device.type, dtype, small):
            result = guarded(lambda case=case: differing(case.make(), REPEATS))
            found["operations"].append(dict(kind=case.kind, shape=case.shape, **result))
    return found


def guarded(function, *args) -> dict:
    """What `function` returns; its error where there is no such kernel, or none that is deterministic."""
    try:
        return function(*args)
    except RuntimeError as error:
        return dict(error=str(error).strip().splitlines()[0][:120])


def make_step(config: dict, device: torch.device, dtype: torch.dtype):
    """A boosted TrainStep as the training script has it, and one micro-batch."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from utils.data.batches import MicroBatch
    from utils.data.inputs import TrainingInputs
    from utils.models import fused_unet
    from utils.runtime.colossal import boost
    from utils.training.flat_parameters import FlatParameters
    from utils.training.optimizer import MasterWeightsOptimizer
    from utils.training.train_step import TrainStep

    with torch.device(device):
        unet = UNet2DConditionModel(**config).train()
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    flat = FlatParameters(unet, dtype, device, memory_format, scattered_grads=on_gpu)
    if on_gpu:
        fused_unet.install(unet)
    unet, optimizer, booster = boost(unet, MasterWeightsOptimizer(flat, learning_rates=[1e-5]))
    prompts = torch.randn(1, 77, config["cross_attention_dim"], device=device, dtype=dtype)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    inputs = TrainingInputs(prompts, None, None, noise_scheduler, 0.18215)
    shape = (1, 4, config["sample_size"], config["sample_size"])
    mean, std, latent_noise, noise = (torch.randn(shape, device=device) for _ in range(4))
    timesteps, rows = torch.tensor([[500], [0]], device=device)
    batch = MicroBatch(mean, std.abs(), latent_noise, noise, timesteps, rows)
    return TrainStep(unet=unet, optimizer=optimizer, booster=booster, inputs=inputs), batch


def compare_gradients(step, batch, device: torch.device) -> dict:
    """Which parameters' gradients differ in bits between passes on the same inputs, and how long a pass takes."""
    unet, flat = step.unet.unwrap(), step.optimizer.flat
    noisy, prompts = batch.noise.to(step.inputs.encoder_hidden_states.dtype), step.inputs.encoder_hidden_states

    def run() -> tuple[torch.Tensor, dict]:
        flat.clear_grads()
        model_pred = unet(noisy, batch.timesteps, prompts, return_dict=False)[0]
        (F.mse_loss(model_pred.float(), batch.latent_noise) * 1024).backward()
        return model_pred.detach(), {name: parameter.grad for name, parameter in flat.parameters}

    pred, first = run()
    first = {name: grad.clone() for name, grad in first.items()}
    differs, preds, largest = set(), False, 0.0
    for _ in range(REPEATS):
        again, grads = run()
        preds = preds or differ(pred, again)
        for name, grad in grads.items():
            if differ(first[name], grad):
                differs.add(name)
                distance = (grad.float() - first[name].float()).norm() / first[name].float().norm().clamp(min=1e-12)
                largest = max(largest, distance.item())
    ms = milliseconds(run, device)
    return dict(pred_differs=preds, num_parameters=len(first), differs=sorted(differs), relative=largest, ms=ms)


def compare_with_graph(step, batch, device: torch.device) -> dict:
    """A captured step replayed twice, then run eagerly twice, from one state: what has other bits after it.

    Eager steps come last: they bind the table of gradients anew, which the graph relies on.
    """
    from utils.training.captured_step import WARM_UP_STEPS, CapturedStep

    said, optimizer = [], step.optimizer
    captured = CapturedStep(step, said.append)
    for _ in range(WARM_UP_STEPS + 1):
        captured([batch])
    ms = milliseconds(lambda: captured([batch]), device, repeats=20)
    start = {name: value.clone() for name, value in state_of(optimizer).items()}

    def run(function) -> dict[str, torch.Tensor]:
        for name, value in state_of(optimizer).items():
            value.copy_(start[name])
        return dict(loss=function([batch])[:1].clone()) | state_of(optimizer)

    def compare(kept: dict, function) -> list[str]:
        found = run(function)
        return [name for name in kept if differ(kept[name], found[name])]

    replayed = {name: value.clone() for name, value in run(captured).items()}
    found = dict(said=said, ms=ms, moves=differ(replayed["exp_avg"], start["exp_avg"]))
    found["second replay against replay"] = compare(replayed, captured)
    found["eager against replay"] = compare(replayed, step)
    del replayed
    eager = {name: value.clone() for name, value in run(step).items()}
    found["second eager against eager"] = compare(eager, step)
    return found


def state_of(optimizer) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    state = dict(weight=optimizer.flat.weight)
    if optimizer.flat.masters.remainder is not None:
        state["remainder"] = optimizer.flat.masters.remainder
    for name in ("exp_avg", "exp_avg_sq", "loss_scale", "num_good", "num_applied", "num_skipped"):
        state[name] = getattr(optimizer, name)
    return state


def milliseconds(run, device: torch.device, repeats: int = 7) -> float:
    """Median time of run(); the caller has run it before."""
    return round(median_ms(run, repeats=repeats, warm_up=0, on_gpu=device.type == "cuda"), 2)


def report(found: dict) -> str:
    """One setting's results, a line an operation that differs, kinds that never do in one."""
    unet, lines = found["unet"], [f"== {found['setting']} ({found['dtype']})"]
    if "error" in unet:
        lines += [f"UNet: {unet['error']}"]
    else:
        lines += [
            f"UNet forward + backward: {unet['ms']} ms; forward {'DIFFERS' if unet['pred_differs'] else 'identical'}, "
            f"{len(unet['differs'])} of {unet['num_parameters']} gradients differ (relative {unet['relative']:.1e})"
        ]
        lines += [f"  {name}" for name in unet["differs"][:SHOWN]]
    if "graph" in found:
        lines += ["captured step:", *(f"  {name}: {value or 'nothing'}" for name, value in found["graph"].items())]
    for kind in dict.fromkeys(row["kind"] for row in found["operations"]):
        rows = [row for row in found["operations"] if row["kind"] == kind]
        same = [row for row in rows if row.get("same")]
        lines += [f"{kind}: {len(same)} of {len(rows)} shapes identical, {sum(row['ms'] for row in same):.2f} ms"]
        for row in rows:
            if "error" in row:
                lines += [f"  {row['shape']}: {row['error']}"]
            elif not row["same"]:
                lines += [f"  {row['shape']}: DIFFERS in {where(row['differs'])}, {row['ms']:.2f} ms"]
    return "\n".join(lines)


def where(differs: list[bool]) -> str:
    """Numbers of the results that differ: outputs first, then the inputs' gradients."""
    return "results " + ", ".join(str(number) for number, value in enumerate(differs) if value)


def say(*words) -> None:
    """A line with the time of day, so that a slow part is seen."""
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def run_child(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """One setting in a process of its own."""
    file = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.determinism", "--setting", name, "--device", args.device]
    command += [f"--json={file}", *(["--small"] if args.small else [])]
    environment = {key: value for key, value in os.environ.items() if key != CUBLAS_VARIABLE}
    if name == "warn_only":
        environment[CUBLAS_VARIABLE] = CUBLAS_CHOICES[0]
    result = subprocess.run(command, env=environment, cwd=ROOT)
    return json.loads(file.read_text()) if result.returncode == 0 else dict(setting=name, failed=result.returncode)


def run_here(args: argparse.Namespace) -> dict:
    """The setting asked for, in this process."""
    from utils.runtime.colossal import launch, leave

    launch(0)
    try:
        return measure(
            args.setting, torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu"), args.small
        )
    finally:
        leave()


def main(argv: list[str] | None = None) -> dict:
    """Measures all settings, prints what was found; returns it."""
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument("--small", action="store_true", help="a small UNet")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (cuda if there is one)"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=SETTINGS,
        help="which kernels may be used (all settings, one after the other)",
    )
    parser.add_argument("--setting", choices=SETTINGS, help="only this one, in this process")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    args = parser.parse_args(argv)
    if args.setting:
        results = run_here(args)
    else:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        results = dict(device=name, torch=torch.__version__, settings=[])
        results["cudnn"] = torch.backends.cudnn.version() if args.device == "cuda" else None
        print(name, "torch", torch.__version__, "cuDNN", results["cudnn"], flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for each in args.settings:
                results["settings"].append(run_child(each, args, Path(folder)))
                found = results["settings"][-1]
                print(report(found) if "unet" in found else found, flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
