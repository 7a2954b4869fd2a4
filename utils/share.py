"""A folder to upload: a trained pipeline, its card, and a run.json that says nothing of this machine.

python -m utils.share OUTPUT NEW_FOLDER
"""

import os
import sys
from pathlib import Path

from utils.command_line import Parser, run_main
from utils.errors import UserError, of_file
from utils.files.atomic import copy_into
from utils.files.json_files import read_json, write_json
from utils.files.ownership import RUN_FILE, check_writable, is_own_output, overlap, run_of
from utils.models.card import CARD_FILE, PICTURE_FILE, clean_record, without_paths, write_card
from utils.models.check import check_base_model
from utils.models.folder import FROZEN_PARTS, MODEL_INDEX, BaseModel
from utils.models.saving import copy_part
from utils.models.weight_files import clean_metadata

VOCABULARIES = ("vocab.json", "tokenizer.json", "added_tokens.json")  # of words, some of which look like paths


def main(argv: list[str] | None = None) -> None:
    """Checks both folders, then copies what a model is."""
    parser = Parser(prog="python -m utils.share", description="Makes a folder to upload of a trained pipeline.")
    parser.add_argument("folder", type=Path, metavar="OUTPUT", help="a folder that training wrote")
    parser.add_argument("target", type=Path, metavar="NEW_FOLDER", help="the folder to upload")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    model = check_base_model(args.folder, "OUTPUT")
    if not is_own_output(args.folder):
        raise UserError(f"OUTPUT {args.folder} was not written by training: its {RUN_FILE} is missing")
    if overlap(args.folder, args.target):
        raise UserError(f"NEW_FOLDER {args.target} overlaps {args.folder}; give it a place of its own")
    if os.path.lexists(args.target) and not (args.target.is_dir() and not any(args.target.iterdir())):
        raise UserError(f"NEW_FOLDER {args.target} exists and is not an empty folder; give another name")
    check_writable(args.target, f"NEW_FOLDER {args.target}")
    try:
        copy_for_sharing(model, args.target)
    except OSError as error:
        raise UserError(of_file(error, args.target, "name another NEW_FOLDER, or make room there")) from error
    shown = f" ({PICTURE_FILE} in it shows your photos)" if (args.target / PICTURE_FILE).is_file() else ""
    print(
        f"{args.target}: read its {CARD_FILE}{shown}, then upload it, for example with 'hf upload NAME {args.target}'"
    )


def copy_for_sharing(model: BaseModel, target: Path) -> None:
    """The pipeline's parts, card and picture as they are, and the cleaned run.json; no checkpoint, log or sample."""
    folder = model.folder
    target.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD_FILE).is_file():
        write_card(model)
    for part in (*FROZEN_PARTS, "unet"):
        copy_part(model, part, target)
    for name in (CARD_FILE, PICTURE_FILE, MODEL_INDEX):
        if (folder / name).is_file():
            copy_into(folder / name, target / name)
    for path in target.rglob("*.json"):
        if path.name not in VOCABULARIES:
            write_json(path, without_paths(read_json(path)))
    for path in target.rglob("*.safetensors"):
        clean_metadata(path, without_paths)
    write_json(target / RUN_FILE, clean_record(run_of(folder)))


if __name__ == "__main__":
    sys.exit(run_main(main))
