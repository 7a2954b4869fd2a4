"""What surrounds a run from its first model to its last file: the lock, the launch, the stream, one-line ends."""

import contextlib
from collections.abc import Iterator

import torch

from utils.files.lock import hold_output
from utils.run.plan import Plan
from utils.runtime.colossal import barrier, get_accelerator, launch, leave
from utils.runtime.determinism import deterministic_kernels
from utils.runtime.environment import is_main
from utils.runtime.ranks import lost_rank_in_one_line
from utils.training.captured_step import training_stream
from utils.training.memory import out_of_memory_in_one_line


@contextlib.contextmanager
def session(plan: Plan) -> Iterator[torch.device]:
    """Holds the output folder, joins the ranks, yields this rank's device, and waits for the ranks at the end.

    Whatever ends it early ends it in one line.
    """
    with hold_output(plan.output_dir, is_main()), contextlib.ExitStack() as surroundings:
        launch(plan.seed)
        surroundings.callback(leave)
        device = get_accelerator().get_current_device()
        surroundings.enter_context(deterministic_kernels(plan.deterministic))
        surroundings.enter_context(lost_rank_in_one_line())
        surroundings.enter_context(training_stream(device))
        surroundings.enter_context(out_of_memory_in_one_line(plan.needs))
        yield device
        barrier(device)
