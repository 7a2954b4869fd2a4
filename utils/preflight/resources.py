"""What a run needs of the machine, against what it has: disk space, GPU memory, a GPU that torch can use."""

import shutil
from argparse import Namespace
from pathlib import Path

from utils.errors import UserError
from utils.files.ownership import nearest_existing
from utils.models.folder import BaseModel, num_parameters
from utils.models.saving import FROZEN_PARTS
from utils.runtime import environment
from utils.runtime.gpu import no_gpu
from utils.training.memory import GB, alternatives, free_host_memory, host_memory_needed, memory_needed


def check_disk(args: Namespace, base: BaseModel, first_step: int) -> tuple[str, str]:
    """What the result and the checkpoints will take, against what is free; UserError where it is too little."""
    count = num_parameters(base)
    unet_bytes = count * (4 if args.save_dtype == "fp32" else 2)
    place = nearest_existing(args.output_dir)
    result = unet_bytes + (0 if _same_device(place, base.folder) else _frozen_bytes(base.folder))
    checkpoint = count * (12 if args.save_dtype == "fp32" else 14)
    planned = args.max_train_steps // args.checkpointing_steps - first_step // args.checkpointing_steps
    most = min(planned, args.checkpoints_total_limit + 1) if args.checkpoints_total_limit else planned
    needed, free = result + most * checkpoint, shutil.disk_usage(place).free
    said = f"{result / GB:.2g} GB for the result"
    said += f", {most} x {checkpoint / GB:.2g} GB for checkpoints" if most else ""
    said += f"; {free / GB:.3g} GB free"
    if needed > free:
        raise UserError(
            f"--output_dir {args.output_dir}: too little disk space ({said}); free some, choose another disk, or keep "
            f"fewer checkpoints with --checkpoints_total_limit or --checkpointing_steps"
        )
    if needed + checkpoint > free:
        return f"{said}: no room for the checkpoint that a signal would ask for", "note"
    return said, "ok"


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _frozen_bytes(folder: Path) -> int:
    files = [path for part in FROZEN_PARTS for path in (folder / part).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def check_device(args: Namespace, base: BaseModel) -> tuple[str, str]:
    """Where the run would train; UserError if there are fewer GPUs than ranks, or if they cannot do what is asked."""
    import torch

    if not torch.cuda.is_available():
        return no_gpu()
    num_ranks = environment.local_world_size() or 1
    if num_ranks > torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node {num_ranks}, but torch sees {torch.cuda.device_count()} GPUs here; start as many ranks"
        )
    device = torch.device("cuda", environment.local_rank())
    if args.offload_optimizer != "none":
        _check_offload(args, device)
    free, _ = torch.cuda.mem_get_info(device)
    return _compare_memory(args, num_parameters(base), torch.cuda.get_device_name(), free)


def _check_offload(args: Namespace, device) -> None:
    """Raises UserError if the update's kernels cannot read and write the host's memory from this GPU."""
    from utils.kernels import operations
    from utils.training import host_memory

    if not host_memory.reaches_host_memory(device):
        flag = "--low_memory" if args.low_memory else f"--offload_optimizer {args.offload_optimizer}"
        why = "which cannot reach the host's memory here" if operations.HAS_TRITON else "which is not here"
        mend = "--gradient_checkpointing and --use_8bit_adam save memory without it"
        raise UserError(f"{flag}: offloading on a GPU needs Triton 3.2 or newer, {why}; {mend}")


def _compare_memory(args: Namespace, count: int, gpu: str, free: float) -> tuple[str, str]:
    """What the run needs of the GPU's memory and of the host's, against what is free."""
    needed, on_host = memory_needed(args, count), host_memory_needed(args, count)
    said = f"{gpu}: about {needed / GB:.1f} GB of memory needed, {free / GB:.1f} GB free"
    if args.low_memory:
        said += f" (--low_memory: --gradient_checkpointing --offload_optimizer {args.offload_optimizer})"
    if on_host:
        said += f"; {on_host / GB:.1f} GB of the host's memory, {free_host_memory() / GB:.1f} GB free"
    if needed > free:
        fitting = [f"{flags} (about {less / GB:.1f} GB)" for flags, less in alternatives(args, count) if less <= free]
        mends = f"it fits with {', or with '.join(fitting)}" if fitting else "try a smaller --resolution"
        return f"{said}: it may not fit; {mends}", "note"
    if on_host > free_host_memory():
        return f"{said}: it may not fit; --use_8bit_adam or another --offload_optimizer takes less", "note"
    return said, "ok"
