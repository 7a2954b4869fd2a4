"""The state of an optimizer by parameter name: copied to the host while training continues, and put back."""

from collections.abc import Callable, Mapping

import torch

from utils.training.eight_bit import EightBit
from utils.training.memory import free_host_memory
from utils.training.optimizer import MasterWeightsOptimizer

COUNTERS = ("loss_scale", "num_good", "num_applied", "num_skipped")
MOMENTS = ("exp_avg", "exp_avg_sq")
Named = list[tuple[str, torch.Tensor]]


class Snapshot:
    """Copies of the masters, moments and counters in host memory, taken again and again into the same place."""

    def __init__(self, optimizer: MasterWeightsOptimizer):
        self.optimizer, self.flat = optimizer, optimizer.flat
        self._host: dict[str, torch.Tensor] = {}

    def take(self) -> Callable[[], None]:
        """Copies the state to the host; the function returned waits until it is there.

        What is offloaded is copied before this returns: later updates write to the same host memory.
        """
        optimizer, on_gpu = self.optimizer, self.flat.device.type == "cuda"
        state = {"master": self.flat.master, **{name: getattr(optimizer, name) for name in (*MOMENTS, *COUNTERS)}}
        self.flat.wait_for_device()
        for name, source in state.items():
            place = self._place(name, source, on_gpu)
            if isinstance(source, EightBit):
                source.read_into(place, self.flat.device)
            elif place is not source:
                place.copy_(source.detach(), non_blocking=True)
        self.flat.wait_for_device()
        if not on_gpu:
            return lambda: None
        event = torch.cuda.Event()  # later updates of the same stream run after the copies
        event.record()
        return event.synchronize

    def _place(self, name: str, source: torch.Tensor | EightBit, on_gpu: bool) -> torch.Tensor:
        """Where a part of the state is copied to: the last snapshot's place, or a new one, or nowhere (no room)."""
        known = self._host.get(name)
        if known is not None and known is not source:
            return known
        if isinstance(source, EightBit):
            self._host[name] = torch.empty(source.numel, dtype=torch.float32, pin_memory=on_gpu)
            return self._host[name]
        arrives_later = on_gpu and source.is_cuda
        no_room = 2 * source.nbytes > free_host_memory()
        copy = None if no_room else torch.empty(source.shape, dtype=source.dtype, pin_memory=arrives_later)
        self._host[name] = source if copy is None else copy
        return self._host[name]

    @property
    def is_shared(self) -> bool:
        """Whether a part is not a copy, for want of memory: the next update would change it."""
        moments = (self._host[name] is getattr(self.optimizer, name) for name in MOMENTS)
        return self._host["master"] is self.flat.master or any(moments)

    def masters(self) -> Named:
        """(parameter name, float32 tensor) each."""
        return self.flat.named(self._host["master"])

    def training_state(self, with_masters: bool) -> Named:
        """The moments, and the masters if asked for, under names like exp_avg.conv_in.weight."""
        parts = ("master", *MOMENTS) if with_masters else MOMENTS
        return [(f"{part}.{name}", value) for part in parts for name, value in self.flat.named(self._host[part])]

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
        counters: as Snapshot.counters gave them.
    """
    flat = optimizer.flat
    read("master", flat.named(flat.master))
    for part in MOMENTS:
        moment = getattr(optimizer, part)
        values = torch.empty(moment.numel) if isinstance(moment, EightBit) else moment
        read(part, flat.named(values))
        if values is not moment:
            moment.write_from(values, flat.device)
    for name in COUNTERS:
        getattr(optimizer, name).fill_(counters[name])
    flat.round_weights(optimizer.num_applied)
