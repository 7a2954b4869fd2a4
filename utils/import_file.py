"""Writes one checkpoint file as a pipeline folder.

python -m utils.import_file MODEL.safetensors NEW_FOLDER
"""

import sys
from pathlib import Path

from utils.command_line import Parser, run_main
from utils.errors import UserError
from utils.files.ownership import check_new_folder
from utils.models.base import SINGLE_FILES, write_converted
from utils.models.check import check_base_model
from utils.models.folder import check_file


def main(argv: list[str] | None = None) -> None:
    """Checks the file and the folder, then writes the folder."""
    parser = Parser(
        prog="python -m utils.import_file", description="Writes one checkpoint file as a pipeline folder, offline."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .safetensors or .ckpt of Stable Diffusion v1")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the new folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    check_file(args.file)
    if args.file.suffix.lower() not in SINGLE_FILES:
        raise UserError(f"FILE {args.file} is none of {', '.join(SINGLE_FILES)}; give a checkpoint file")
    check_new_folder(args.folder, "FOLDER")
    try:
        write_converted(args.file, args.folder)
    except OSError as error:
        raise UserError(f"FOLDER {args.folder} cannot be written ({error.strerror or error})") from error
    check_base_model(args.folder, "FOLDER")
    print(
        f"{args.folder}: a pipeline folder for --pretrained_model_name_or_path and DiffusionPipeline.from_pretrained"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
