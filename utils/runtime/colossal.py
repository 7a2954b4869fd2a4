"""The parts of ColossalAI this project uses, imported without the warnings its optional accelerators give."""

import contextlib
import os
import socket
import sys

from utils.runtime.gpu import problems_of_gpu
from utils.runtime.libraries import lean_imports, quiet_imports
from utils.runtime.stand_ins import stand_ins
from utils.runtime.timing import mark

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
with quiet_imports(), lean_imports():
    with stand_ins() as broken:
        import colossalai
        import torch
        import torch.distributed as dist
        from colossalai.accelerator import get_accelerator
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin
        from colossalai.interface import OptimizerWrapper
        from torch.nn.parallel import DistributedDataParallel
    import diffusers  # noqa: F401  after the stand-ins: it notes at import which packages there are
if os.environ.get("RANK", "0") == "0":
    for package, reason in broken.items():
        print(
            f"note: {package} cannot be imported ({reason}); training does not need it (python -m utils.doctor)",
            file=sys.stderr,
        )

__all__ = ["OptimizerWrapper", "barrier", "boost", "get_accelerator", "launch"]

SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def _free_port() -> str:
    """A port that was free a moment ago: torch 2.5 does not take 0 for one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(seed: int) -> None:
    """colossalai.launch_from_torch; started without torchrun, it is one process of its own."""
    alone = {} if "RANK" in os.environ else dict(SINGLE_PROCESS, MASTER_PORT=_free_port())
    mark("imported")
    if os.environ.get("RANK", "0") == "0":
        for line in problems_of_gpu():
            print(line, file=sys.stderr, flush=True)
    os.environ.update(alone)
    try:
        with quiet_imports(), _keys_of_this_attempt():
            colossalai.launch_from_torch(seed=seed, verbose=False)
    finally:
        for name in alone:
            del os.environ[name]
    mark("launched")


@contextlib.contextmanager
def _keys_of_this_attempt():
    """After a restart torchrun's store still holds the addresses of the ranks that died: use keys of our own."""
    attempt, initialize = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), dist.init_process_group

    def with_prefix(*, rank: int, world_size: int, backend: str, init_method: str) -> None:
        store, *_ = next(dist.rendezvous(init_method, rank, world_size))
        store.set_timeout(dist.default_pg_timeout)
        initialize(
            rank=rank, world_size=world_size, backend=backend, store=dist.PrefixStore(f"attempt-{attempt}", store)
        )

    if attempt != "0":
        dist.init_process_group = with_prefix
    try:
        yield
    finally:
        dist.init_process_group = initialize


def boost(model, optimizer: OptimizerWrapper) -> tuple:
    """The model and the optimizer (a MasterWeightsOptimizer) boosted with the TorchDDP plugin, and the Booster.

    Where gradients have no buffer of their own, several ranks' are left in the buckets that they are reduced in.
    """
    if dist.get_world_size() == 1:
        # Nothing to reduce, but DDP allocates buckets for all the gradients it manages: let it manage the last one.
        names = [name for name, _ in model.named_parameters()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names[:-1])
    with quiet_imports():
        booster = Booster(plugin=TorchDDPPlugin(gradient_as_bucket_view=optimizer.flat.grad is None))
        model, optimizer, *_ = booster.boost(model, optimizer)
    mark("boosted")
    return model, optimizer, booster


def barrier(device: torch.device) -> None:
    """Waits for all ranks; NCCL is told the device, or it guesses one and warns."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None)
