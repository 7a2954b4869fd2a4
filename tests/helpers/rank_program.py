"""The training script with a rank that kills itself before its second step; test_ranks.py runs it under torchrun."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.training.train_step import TrainStep

plain_call = TrainStep.__call__
num_calls = 0


def call(self, micro_batches):
    global num_calls
    num_calls += 1
    if os.environ["RANK"] == "1" and num_calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_call(self, micro_batches)


TrainStep.__call__ = call
sys.exit(run_main(main))
