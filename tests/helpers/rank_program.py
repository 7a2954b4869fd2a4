"""The training script, which kills itself after step $KILLED_AFTER; under torchrun rank 1 of the first start does."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.processes import die_after
from train_dreambooth_colossalai import main
from utils.command_line import run_main

if (os.environ.get("RANK", "1"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == ("1", "0"):
    die_after(int(os.environ["KILLED_AFTER"]))()
sys.exit(run_main(main))
