"""What ranks have to agree on: a mistake that one of them finds is everyone's."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from utils.errors import UserError
from utils.runtime.environment import rank

T = TypeVar("T")
EXIT_LOST_RANK = 3
# How gloo and NCCL report that the other end of a connection is gone.
LOST_RANK_SIGN = re.compile(r"gloo|nccl|connection (closed|reset|refused)|remote process exited|broken pipe", re.I)


def on_all_ranks(function: Callable[[], T], *, main_only: bool = False) -> T:
    """Runs `function` on every rank, or on rank 0 for all; a UserError on any rank is raised on all of them.

    So is an OSError (a full disk, no permission), as a UserError. It also keeps ranks in step: none returns before all
    have called it. Returns the rank's own result, or rank 0's.
    """
    result: Any = None
    complaint: str | None = None
    complaints: list[str | None]
    if not main_only or dist.get_rank() == 0:
        try:
            result = function()
        except (UserError, OSError) as error:
            complaint = str(error)
    if dist.get_world_size() == 1:
        complaints = [complaint]
    elif main_only:
        shared = [(result, complaint)]
        dist.broadcast_object_list(shared)
        result, complaint = shared[0]
        complaints = [complaint]
    else:
        complaints = [None] * dist.get_world_size()
        dist.all_gather_object(complaints, complaint)
    for complaint in complaints:
        if complaint is not None:
            raise UserError(complaint)
    return result


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether an error says that another rank is gone."""
    return isinstance(error, RuntimeError) and dist.get_world_size() > 1 and bool(LOST_RANK_SIGN.search(str(error)))


def lost_rank_line() -> str:
    """What a rank says then."""
    return (
        f"error: rank {rank()}: another process of this run has ended, so this one ends too; "
        f"the cause is what that one said, and torchrun's 'Root Cause' below names it"
    )


@contextlib.contextmanager
def lost_rank_in_one_line() -> Iterator[None]:
    """When another rank has died, this one says so in one line and exits with code 3, without a traceback.

    torchrun ends the other ranks and names the one that died first, but only a moment later: until then the others
    fail in whatever they were sending to it or waiting for.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        print(lost_rank_line(), file=sys.stderr, flush=True)
        raise SystemExit(EXIT_LOST_RANK) from None
