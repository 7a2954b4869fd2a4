"""Writes a pipeline folder as one checkpoint file.

python -m utils.export PIPELINE_DIR OUT.safetensors [--dtype fp16]
"""

import sys
from pathlib import Path

from utils.command_line import Parser, run_main
from utils.files.ownership import check_export_file
from utils.models.check import check_base_model
from utils.models.folder import prediction_type
from utils.models.single_file import DTYPES, export_single_file


def main(argv: list[str] | None = None) -> None:
    """Checks the folder and the file, then writes it."""
    parser = Parser(prog="python -m utils.export", description="Writes a pipeline folder as one checkpoint file.")
    parser.add_argument("folder", type=Path, metavar="PIPELINE_DIR", help="a folder that training wrote, or a base")
    parser.add_argument("file", type=Path, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of every tensor (default: as in the folder)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    check_base_model(args.folder, "PIPELINE_DIR")
    check_export_file(args.file, with_config=prediction_type(args.folder) == "v_prediction")
    export_single_file(args.folder, args.file, args.dtype)
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB, read by ComfyUI, A1111 and from_single_file")


if __name__ == "__main__":
    sys.exit(run_main(main))
