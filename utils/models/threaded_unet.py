"""The UNet's forward for sampling small images on a CPU: a part of the batch in each thread.

If the batch is in one piece, the cores share every operation, and wait for each other at the end of each one.
A thread that has a part of the batch to itself waits for nobody.
"""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from utils.models.captured_unet import is_usual_call

_MAX_POSITIONS = 32 * 32  # of a latent: operations on larger ones are long enough to be shared


class ThreadedUNet:
    """Serves a pipeline's UNet as CapturedUNet does, with as many threads as torch has."""

    @contextlib.contextmanager
    def serving(self, pipeline: Any) -> Iterator[None]:
        """Inside, the pipeline calls its UNet in threads; afterwards it is as it was."""
        unet, num_threads = pipeline.unet, torch.get_num_threads()
        if num_threads == 1 or "forward" in vars(unet):
            yield
            return
        with ThreadPoolExecutor(num_threads, initializer=_as_one_thread) as pool:
            all_started = threading.Barrier(num_threads)
            list(pool.map(lambda _: all_started.wait(), range(num_threads)))
            torch.set_num_threads(num_threads)  # the last one to set it for itself has set it for threads to come, too
            unet.forward = partial(_forward, unet, pool, num_threads)
            try:
                yield
            finally:
                del unet.forward


def _as_one_thread() -> None:
    """Operations that this thread calls are its own work alone."""
    torch.get_num_threads()  # what a thread sets before it has asked is lost
    torch.set_num_threads(1)


def _forward(
    unet: Any,
    pool: ThreadPoolExecutor,
    num_threads: int,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    return_dict: bool = True,
    **options: Any,
) -> Any:
    """UNet2DConditionModel.forward: sample [N,C,h,w], timestep a scalar tensor, encoder_hidden_states [N,77,D]."""
    plain = partial(type(unet).forward, unet)
    is_divided = len(sample) > 1 and sample[0, 0].numel() <= _MAX_POSITIONS
    if not is_divided or not is_usual_call(timestep, return_dict, options):
        return plain(sample, timestep, encoder_hidden_states, return_dict=return_dict, **options)
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def part(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with mode():
            return plain(rows, timestep, hidden, return_dict=False)[0]

    parts = zip(sample.chunk(num_threads), encoder_hidden_states.chunk(num_threads), strict=True)
    futures = [pool.submit(part, *each) for each in parts]
    return (torch.cat([future.result() for future in futures]),)
