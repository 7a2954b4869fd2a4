"""A small module and its optimizer."""

import torch

from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer


def make_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 4, 5))


def make_optimizer(weight_dtype=torch.float32, lr=1e-3, **options):
    module = make_module()
    optimizer = MasterWeightsOptimizer(FlatParameters(module, weight_dtype, "cpu"), learning_rates=[lr], **options)
    return module, optimizer
