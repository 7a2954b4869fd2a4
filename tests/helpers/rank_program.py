"""The training script with one fault or one observation built in, to be run under torchrun by test_ranks.py.

python rank_program.py {overflow,watch,die} REPORT_DIR [training flags...]
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.training import train_step
from utils.training.optimizer import MasterWeightsOptimizer

FAULTY_RANK, FAULTY_STEP = 1, 2
rank = int(os.environ["RANK"])
report: dict = dict(synchronised=[], applied=[])
plain_call, plain_forward_backward = train_step.TrainStep.__call__, train_step.TrainStep._forward_backward
plain_step = MasterWeightsOptimizer.step
plain_loss = train_step.denoising_loss
num_calls = 0


def call(self, micro_batches):
    global num_calls
    num_calls += 1
    if sys.argv[1] == "die" and (rank, num_calls) == (FAULTY_RANK, FAULTY_STEP):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_call(self, micro_batches)


def forward_backward(self, batch, num_micro_batches):
    report["synchronised"].append(bool(self.unet.module.require_backward_grad_sync))
    return plain_forward_backward(self, batch, num_micro_batches)


def loss(*arguments):
    value = plain_loss(*arguments)
    if sys.argv[1] == "overflow" and (rank, num_calls) == (FAULTY_RANK, FAULTY_STEP):
        value = value * torch.inf
    return value


def step(self):
    metrics = plain_step(self)
    report["applied"].append(int(self.num_applied))
    report["master"] = hashlib.sha256(self.flat.master.numpy().tobytes()).hexdigest()
    return metrics


train_step.TrainStep.__call__ = call
train_step.TrainStep._forward_backward = forward_backward
train_step.denoising_loss = loss
MasterWeightsOptimizer.step = step
code = run_main(main, sys.argv[3:])
Path(sys.argv[2], f"rank-{rank}.json").write_text(json.dumps(report))
sys.exit(code)
