"""The state of an optimizer by parameter name: copied to the host while training continues, and put back."""

from collections.abc import Callable, Iterable, Mapping

import torch

from utils.training.flat_parameters import Anew
from utils.training.memory import free_host_memory
from utils.training.optimizer import MasterWeightsOptimizer
from utils.training.packed import EightBit, Packed

COUNTERS_OF_UPDATES = ("num_applied", "num_skipped")
COUNTERS = (*COUNTERS_OF_UPDATES, "loss_scale", "num_good")  # the latter two mean something with a loss scale alone
MOMENTS = ("exp_avg", "exp_avg_sq")
Named = Iterable[tuple[str, torch.Tensor]]


class Snapshot:
    """Copies of the masters, moments and counters in host memory, taken again and again into the same place."""

    def __init__(self, optimizer: MasterWeightsOptimizer):
        self.optimizer, self.flat = optimizer, optimizer.flat
        self._host: dict[str, torch.Tensor] = {}  # without what there was no room for

    def take(self) -> Callable[[], None]:
        """Copies the state to the host; the function returned waits until it is there.

        What is offloaded is copied before this returns: later updates write to the same host memory.
        """
        on_gpu = self.flat.device.type == "cuda"
        self.flat.wait_for_device()
        for name, source in self._state().items():
            place = self._place(name, source, on_gpu)
            if place is None:
                continue
            if isinstance(source, Packed):
                source.read_into(place, self.flat.device)
            else:
                place.copy_(source, non_blocking=True)
        self.flat.wait_for_device()
        if not on_gpu:
            return lambda: None
        event = torch.cuda.Event()  # later updates of the same stream run after the copies
        event.record()
        return event.synchronize

    def _state(self) -> dict[str, torch.Tensor | Packed]:
        parts = {name: getattr(self.optimizer, name) for name in (*MOMENTS, *COUNTERS)}
        return {"master": self.flat.masters, **parts}

    def _place(self, name: str, source: torch.Tensor | Packed, on_gpu: bool) -> torch.Tensor | None:
        """Where a part of the state is copied to: the last snapshot's place, or a new one, or nowhere (no room)."""
        if name in self._host:
            return self._host[name]
        if isinstance(source, Packed):
            shape, dtype, arrives_later = torch.Size([source.numel]), torch.float32, on_gpu
        else:
            shape, dtype, arrives_later = source.shape, source.dtype, on_gpu and source.is_cuda
        must_be_copied = name in COUNTERS or isinstance(source, EightBit)
        if not must_be_copied and 2 * shape.numel() * dtype.itemsize > free_host_memory():
            return None
        self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=arrives_later)
        return self._host[name]

    @property
    def is_shared(self) -> bool:
        """Whether a part is not a copy, for want of memory: the next update would change it."""
        return len(self._host) < len(self._state())

    def masters(self) -> Named:
        """(parameter name, float32 tensor) each."""
        return self.flat.named(self._host["master"]) if "master" in self._host else self.flat.named_masters()

    def training_state(self, with_masters: bool) -> Named:
        """The moments, and the masters if asked for, under names like exp_avg.conv_in.weight."""
        parts = {"master": self.masters()} if with_masters else {}
        parts |= {name: self.flat.named(self._host.get(name, getattr(self.optimizer, name))) for name in MOMENTS}
        return Anew(lambda: ((f"{part}.{name}", value) for part, named in parts.items() for name, value in named))

    def counters(self) -> dict[str, float]:
        """The loss scale, and how many updates there were."""
        return {name: self._host[name].item() for name in COUNTERS}


@torch.no_grad()
def restore(
    optimizer: MasterWeightsOptimizer, read: Callable[[str, Named], None], counters: Mapping[str, float]
) -> None:
    """Puts a state back into the optimizer's own tensors, which a CUDA graph may refer to.

    Args:
        read: fills (parameter name, tensor) pairs with a part of the state: "master", "exp_avg" or "exp_avg_sq".
        counters: as Snapshot.counters gave them; those that are left out stay as they are.
    """
    flat = optimizer.flat
    for name, value in counters.items():  # first: masters are split by the number of updates
        getattr(optimizer, name).fill_(value)
    parts = {"master": flat.masters, **{name: getattr(optimizer, name) for name in MOMENTS}}
    for name, part in parts.items():
        values = torch.empty(part.numel) if isinstance(part, Packed) else part
        read(name, flat.named(values))
        if values is not part:
            part.write_from(values, flat.device)
