"""What the scripts are made of; PROGRAM is its name in the files that it writes."""

import sys

PROGRAM = "train_dreambooth_colossalai"

if sys.platform == "win32":
    print(
        "error: this program runs on Linux; on Windows use WSL 2 ('wsl --install', then call it there)",
        file=sys.stderr,
    )
    sys.exit(2)
