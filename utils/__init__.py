"""What the scripts are made of; PROGRAM is its name in the files that it writes."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; the library reads it when it is imported
PROGRAM = "train_dreambooth_colossalai"

if sys.platform == "win32":
    print(
        "error: this program runs on Linux; on Windows use WSL 2 ('wsl --install', then call it there)",
        file=sys.stderr,
    )
    sys.exit(2)
