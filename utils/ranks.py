"""What ranks have to agree on: a mistake that one of them finds is everyone's."""

import contextlib
import os
import sys
from collections.abc import Callable

import torch.distributed as dist

from utils.errors import UserError

EXIT_LOST_RANK = 3
# How gloo and NCCL report that the other end of a connection is gone.
LOST_RANK_SIGNS = ("closed by peer", "reset by peer", "remote process exited", "Connection refused", "Broken pipe")


def together(function: Callable[[], object], *, main_only: bool = False):
    """Runs `function` on every rank, or on rank 0 for all; a UserError on any rank is raised on all of them.

    So is an OSError (a full disk, no permission), as a UserError. It also keeps ranks in step: none returns before all
    have called it. Returns the rank's own result, or rank 0's.
    """
    result, complaint = None, None
    if not main_only or dist.get_rank() == 0:
        try:
            result = function()
        except (UserError, OSError) as error:
            complaint = str(error)
    if main_only:
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


@contextlib.contextmanager
def lost_rank_in_one_line():
    """What a rank says when another one has died under it: one line and exit code 3, not a traceback of its own.

    torchrun ends the others and names the one that died first; this is for what is in between.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_RANK_SIGNS):
            raise
        print(
            f"error: rank {os.environ.get('RANK', '0')}: another process of this run has ended, so this one ends too; "
            f"the cause is what that one said, and torchrun's 'Root Cause' below names it",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_LOST_RANK) from None
