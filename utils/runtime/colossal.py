"""The parts of ColossalAI this project uses: launch, boost, barrier, the optimizer's base class."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import utils.runtime.libraries as libraries

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.runtime import environment, private
from utils.runtime.gpu import say_problems_of_gpu
from utils.runtime.process import mark
from utils.runtime.ranks import meet

with libraries.quiet_imports(), libraries.lean_imports(), libraries.stand_ins():
    import colossalai
    from colossalai.accelerator import get_accelerator
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin
    from colossalai.interface import OptimizerWrapper

BUCKET_MB = 100  # fewer collectives than with DDP's 25; the last one, of the first layers' gradients, is small

__all__ = ["OptimizerWrapper", "barrier", "boost", "get_accelerator", "launch", "leave", "sum_vectors"]


def launch(seed: int, ready: Callable[[], dict], differences: Callable[[dict, dict], list[str]]) -> None:
    """ranks.meet, and colossalai.launch_from_torch over its store; one rank has none."""
    mark("imported")
    if environment.is_main():
        say_problems_of_gpu()
    store = _own_store(meet(ready, differences) or dist.HashStore())
    with store, environment.as_torchrun_says_it(), libraries.quiet_imports():
        colossalai.launch_from_torch(seed=seed, verbose=False)
    _begin_to_connect()
    mark("launched")


def leave() -> None:
    """Undoes launch, also where a run ends before its first collective."""
    _wait_until_connected()
    dist.destroy_process_group()


_connecting: list[threading.Thread] = []  # begun, and not waited for yet


def _begin_to_connect() -> None:
    """Begins NCCL's own start, which its first collective waits for, while photos and weights are read.

    With several ranks that collective is left to whoever is first: all have to call theirs in the same order.
    """
    if dist.get_world_size() == 1 and dist.get_backend() == "nccl":
        _connecting.append(threading.Thread(target=_first_collective, name="NCCL", daemon=True))
        _connecting[-1].start()


def _first_collective() -> None:
    with contextlib.suppress(RuntimeError):  # it fails again, with its message, where it is needed
        dist.all_reduce(torch.zeros(1, device="cuda"))


def _wait_until_connected() -> None:
    """Two threads must not call collectives at once, nor one while the group is destroyed."""
    while _connecting:
        _connecting.pop().join()


def _own_store(store: dist.Store) -> contextlib.AbstractContextManager[None]:
    """A context in which the ranks tell each other their addresses in `store`, not in one that torch opens."""
    initialize = dist.init_process_group

    def with_store(*, rank: int, world_size: int, backend: str, init_method: str) -> None:
        initialize(rank=rank, world_size=world_size, backend=backend, store=store)

    return libraries.replaced(dist, "init_process_group", with_store)


def boost(model: torch.nn.Module, optimizer: OptimizerWrapper) -> tuple:
    """The model and the optimizer (a MasterWeightsOptimizer) boosted with the TorchDDP plugin, and the Booster.

    Several ranks' gradients are summed, not averaged: each rank's loss is to be its share of the mean. If gradients
    have no buffer of their own, they are left in the buckets that they are summed in. DDP copies a gradient there by a
    kernel of its own, but not one that lies there already: linear layers' are written there (kernels.operations), and
    vectors, 404 of the UNet's 686 parameters with a two-thousandth of the values, are left to `sum_vectors`.
    """
    _wait_until_connected()
    names, num_ranks = list(_vectors(model)), dist.get_world_size()
    if num_ranks == 1:
        # Nothing to reduce, but DDP allocates buckets for all the gradients it manages: let it manage the last one.
        names = [name for name, _ in model.named_parameters()][:-1]
    getattr(DistributedDataParallel, private.DDP_IGNORES)(model, names)
    with libraries.quiet_imports():
        plugin = TorchDDPPlugin(bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=optimizer.flat.grad is None)
        booster = Booster(plugin=plugin)
        model, optimizer, *_ = booster.boost(model, optimizer)
    if num_ranks > 1:
        ddp: Any = model.module
        ddp.register_comm_hook(optimizer, type(optimizer).sum_bucket)
    mark("boosted")
    return model, optimizer, booster


def _vectors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that DDP is not to manage: biases, and the norms' weights."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() <= 1}


def sum_vectors(model: torch.nn.Module) -> None:
    """Sums the gradients of the boosted model's vectors, which DDP does not, over the ranks: one collective."""
    grads = [parameter.grad for parameter in _vectors(model).values() if parameter.grad is not None]
    together = torch.cat(grads)
    dist.all_reduce(together)
    getattr(torch, private.FOREACH_COPY)(grads, list(together.split([grad.numel() for grad in grads])))


def barrier(device: torch.device) -> None:
    """Waits for all ranks; NCCL is told the device, or it guesses one and warns."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None)
