"""What ranks have to agree on: a mistake that one of them finds is everyone's."""

from collections.abc import Callable

import torch.distributed as dist

from utils.errors import UserError


def together(function: Callable[[], object], *, main_only: bool = False):
    """Runs `function` on every rank, or on rank 0 for all; a UserError on any rank is raised on all of them.

    It also keeps ranks in step: none returns before all have called it. Returns the rank's own result, or rank 0's.
    """
    result, complaint = None, None
    if not main_only or dist.get_rank() == 0:
        try:
            result = function()
        except UserError as error:
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
