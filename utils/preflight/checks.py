"""Everything that is checked before a model is loaded, in the order in which a mistake is soonest found.

What needs neither a photo nor a plan comes first, and imports nothing that takes time: such complaints are instant.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.errors import EXIT_USER_ERROR
from utils.models.base import base_folder
from utils.models.check import check_base_model
from utils.models.folder import BaseModel, default_save_dtype
from utils.preflight.output import check_output_dir, check_resolution
from utils.preflight.table import NOTE, PreflightTable
from utils.runtime import environment

if TYPE_CHECKING:
    from utils.run.plan import Plan
    from utils.run.resume import Sources


class PreflightResult(NamedTuple):
    """What a run does and what it is made from; both None if a check failed, which only a dry run survives.

    `exit_code` is a dry run's.
    """

    plan: "Plan | None"
    sources: "Sources | None"
    exit_code: int


def run_preflight(args: Namespace, notes: Sequence[str] = (), *, is_quick: bool = False) -> PreflightResult:
    """Makes all the checks and prints the table, `notes` first, on rank 0; `is_quick`: but those that need torch.

    Raises UserError at the first problem, but with --dry_run lists all of them.
    """
    table = PreflightTable(collects=args.dry_run, is_quick=is_quick)
    for note in notes:
        table.add("flag", note, NOTE)
    base, save_dtype = _check_model_and_output(table, args)

    from utils.preflight.sources import check_sources  # photos: only now, so that what comes before is instant

    plan, sources = check_sources(table, args, base, save_dtype)
    if environment.is_main():
        table.show()
    return PreflightResult(plan, sources, EXIT_USER_ERROR if table.num_problems else 0)


def _check_model_and_output(table: PreflightTable, args: Namespace) -> tuple[BaseModel | None, str | None]:
    """The base, and the dtype of its UNet's file, which the result has by default."""
    base = table.run("base model", _find_base, args.pretrained_model_name_or_path, args.pretrained_vae_name_or_path)
    if base is not None:
        table.run("resolution", check_resolution, args.resolution, base)
    others = ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "instance_data_dir", "tokenizer_name")
    folders = {flag: getattr(args, flag) for flag in others}
    table.run("output", check_output_dir, args.output_dir, folders, args.export_single_file)
    if base is None or args.save_dtype:
        return base, args.save_dtype
    return base, table.run("base model", default_save_dtype, base.unet_weights)


def _find_base(path: Path, vae: Path | None) -> BaseModel:
    return check_base_model(base_folder(path, "--pretrained_model_name_or_path", vae))
