"""Whether the output folder can be written and holds nothing that is not this program's."""

import os
from collections.abc import Mapping
from pathlib import Path

from utils.errors import UserError
from utils.files.filesystems import is_same_place
from utils.files.lock import LOCK_FILE, check_not_in_use
from utils.files.ownership import (
    check_export_file,
    is_left_by_system,
    is_own_output,
    is_writable,
    nearest_existing,
    overlap,
)
from utils.models.folder import BaseModel, is_reserved
from utils.runtime import environment


def check_resolution(resolution: int, base: BaseModel) -> None:
    """Raises UserError if the VAE cannot encode crops of --resolution."""
    factor = base.vae_scale_factor
    if resolution % factor:
        lower = resolution // factor * factor
        near = f"{lower} or {lower + factor}" if lower else str(factor)
        raise UserError(f"--resolution {resolution} is not divisible by the VAE's factor {factor}; use {near}")


def check_output_dir(output: Path, others: Mapping[str, Path | None], export_single_file: Path | None) -> None:
    """--output_dir can be written and holds nothing that is not this program's; writes nothing itself.

    Raises UserError otherwise, also if it overlaps one of `others`, {flag: folder}.
    """
    for flag, other in others.items():
        if other and overlap(output, other):
            raise UserError(f"--output_dir {output} overlaps --{flag} {other}; give the output a folder of its own")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output_dir {output} is not a folder; name a new or an empty one")
    if output.is_dir() and not is_own_output(output) and (found := _foreign(output)):
        shown = ", ".join(repr(name) for name in found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        raise UserError(
            f"--output_dir {output} holds files that this program did not write ({shown}); name an empty or a new "
            f"folder, or move them away"
        )
    existing = nearest_existing(output)
    if not existing.is_dir():
        raise UserError(f"--output_dir {output}: {existing} is a file, so no folder can be made in it")
    if not is_writable(existing):
        raise UserError(f"--output_dir {output}: no permission to write in {existing}")
    if environment.is_main():
        check_not_in_use(output)
    if export_single_file:
        check_export_file(export_single_file)
        _check_export_place(output, export_single_file)


def _check_export_place(output: Path, file: Path) -> None:
    """The single file may lie in the output folder, but in no folder that a run fills or replaces there."""
    place = output.resolve()
    inside = next((path.name for path in file.resolve().parents if is_same_place(path.parent, place)), "")
    if is_reserved(inside):
        raise UserError(f"--export_single_file {file} lies among the run's own files; name another folder")


def _foreign(folder: Path) -> list[str]:
    """Names of what someone has put into a folder; what systems leave in every folder is not among them."""
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name != LOCK_FILE and not is_left_by_system(name)]
