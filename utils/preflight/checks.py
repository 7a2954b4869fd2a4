"""Everything that is checked before a model is loaded, in the order in which a mistake is soonest found.

What needs neither a photo nor a plan comes first, and imports nothing that takes time: such complaints are instant.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.files import ownership
from utils.files.atomic import is_same_place
from utils.files.lock import check_not_in_use
from utils.models.base import base_folder
from utils.models.check import check_base_model, check_scheduler
from utils.models.folder import is_reserved
from utils.preflight.table import NOTE, Check, Found, Row, as_lists, as_text, rows_of
from utils.run.lineage import list_checkpoints
from utils.runtime import environment
from utils.runtime.process import columns

if TYPE_CHECKING:
    from utils.run.plan import Plan
    from utils.run.resume import Sources

# None of them may overlap --output_dir.
INPUTS = ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "instance_data_dir", "tokenizer_name")


def run_preflight(
    args: Namespace, notes: Sequence[str] = (), *, is_quick: bool = False
) -> "tuple[Plan | None, Sources | None, int]":
    """Makes all the checks and prints what is odd, `notes` first, on rank 0; `is_quick`: but those that need torch.

    What a run does and what it is made from, None if a check failed, which a dry run alone survives; its exit code.
    Raises UserError at the first problem, but with --dry_run prints the whole table, with the problems of all checks;
    with --json too, those and what the run takes as one JSON object (docs/serving.md).
    """
    found = Found(args, is_quick)
    rows = [("flag", note, NOTE) for note in notes] + rows_of(CHECKS, found)

    from utils.preflight import resources, sources  # photos: only now, so that what comes before is instant

    rows += rows_of(sources.CHECKS, found)
    exit_code = min(found.exit_codes, default=0)  # what may pass is worth another try only if it is alone
    plan, made_from = getattr(found, "plan", None), getattr(found, "sources", None)
    if environment.is_main() and args.dry_run and args.json:
        needs = resources.as_numbers(plan, made_from)
        print(json.dumps(dict(exit_code=exit_code, **as_lists(rows), **needs)), flush=True)
    elif environment.is_main():
        print(as_text(rows, columns(), in_full=args.dry_run), flush=True)  # a log gets whole lines
    return plan, made_from, exit_code


def find_launcher(found: Found) -> Iterator[Row]:
    """What started this process. run.sh, which makes the quick checks, is itself the launcher of one machine."""
    yield from (("launcher", note, NOTE) for note in environment.check_launcher())
    if found.is_quick and environment.num_ranks() > 1:
        raise UserError(f"run.sh trains on one machine; WORLD_SIZE is {environment.num_ranks()}: docs/scaling.md")


def find_base(found: Found) -> None:
    """The base: a whole Stable Diffusion v1 pipeline."""
    flag, vae = "pretrained_model_name_or_path", found.args.pretrained_vae_name_or_path
    base = check_base_model(base_folder(getattr(found.args, flag), f"--{flag}", vae))
    check_scheduler(base)  # one that cannot draw is no base
    found.base = base


def check_resolution(found: Found) -> None:
    """UserError if the VAE cannot encode crops of --resolution."""
    resolution, factor = found.args.resolution, found.base.vae_scale_factor
    if resolution % factor:
        lower = resolution // factor * factor
        near = f"{lower} or {lower + factor}" if lower else str(factor)
        raise UserError(f"--resolution {resolution} is not divisible by the VAE's factor {factor}; use {near}")


def check_output(found: Found) -> None:
    """--output_dir can be written and holds only what is this program's; writes nothing. UserError otherwise."""
    output, export_single_file = found.args.output_dir, found.args.export_single_file
    for flag in INPUTS:
        if (other := getattr(found.args, flag)) and ownership.overlap(output, other):
            raise UserError(f"--output_dir {output} overlaps --{flag} {other}; give the output a folder of its own")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output_dir {output} is not a folder; name a new or an empty one")
    if foreign := ownership.kept_names(output) if not ownership.is_own_output(output) else []:
        shown = ", ".join(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if foreign[3:] else "")
        ours = list_checkpoints(output)  # without a run.json that can be read
        goes_on = f"; {ours[-1].path} is ours: a new folder can go on --resume_from_checkpoint that" if ours else ""
        raise UserError(
            f"--output_dir {output} holds files that this program did not write ({shown}); name an empty or a new "
            f"folder, or move them away{goes_on}"
        )
    ownership.check_writable(output, f"--output_dir {output}")
    if environment.is_main():
        check_not_in_use(output)
    if export_single_file:
        ownership.check_export_file(export_single_file)
        # It may lie in the output folder, but in no folder that a run fills or replaces there.
        place, folders = output.resolve(), export_single_file.resolve().parents
        if is_reserved(next((folder.name for folder in folders if is_same_place(folder.parent, place)), "")):
            raise UserError(f"--export_single_file {export_single_file} lies among the run's own files; name another")


CHECKS: tuple[Check, ...] = (
    ("launcher", "", find_launcher),
    ("base model", "", find_base),
    ("resolution", "base", check_resolution),
    ("output", "", check_output),
)
