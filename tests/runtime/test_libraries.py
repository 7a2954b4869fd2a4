"""What the imports of the libraries change and change back, and what they leave out."""

import json

import pytest
import torch

from tests.helpers.script import run_python

LATER_STACK = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


# One process that answers for evaluation first, which must do without ColossalAI, and then for training.
QUESTIONS = """
import importlib.metadata, json, sys, torch
before = torch.compile, importlib.metadata.packages_distributions, torch.distributed.is_available
import utils.evaluation.generate, utils.evaluation.score
answers = dict(evaluation=[name for name in sys.modules if name.partition(".")[0] == "colossalai"])
import utils.runtime.colossal
from utils.runtime.aside import Aside
answers["training"] = "colossalai" in sys.modules
answers["as it was"] = before == (
    torch.compile, importlib.metadata.packages_distributions, torch.distributed.is_available
)
answers["absent"] = [name for name, module in sys.modules.items() if module is None and "." not in name]
answers["modules"] = list(sys.modules)
answers["aside"] = [name for name in ("torch._dynamo", "scipy") if type(sys.modules.get(name)) is Aside]
answers["imported"] = [name for name in ("torch._dynamo", "scipy") if name in sys.modules]

import torch._dynamo.utils
answers["found"] = torch._dynamo.utils is sys.modules["torch._dynamo.utils"], type(torch._dynamo).__name__
compiled = torch.compile(lambda x: (x * 2).relu(), backend="eager")
answers["compiled"] = compiled(torch.tensor([-1.0, 3.0])).tolist()
answers["mode"] = torch._dynamo.utils.get_optimize_ddp_mode()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict:
    result = run_python(QUESTIONS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_imports_leave_nothing_behind(answers):
    assert answers["as it was"] and answers["absent"] == []
    stand_ins = [name for name in answers["modules"] if "torch_fsdp_plugin" in name or name.startswith("galore_torch")]
    assert stand_ins == []


@pytest.mark.skipif(not LATER_STACK, reason="older libraries import more")
def test_what_nothing_uses_is_not_imported(answers):
    unused = {"sympy", "torch._inductor", "torch.distributed.tensor"}
    unused |= {"peft", "bitsandbytes", "sklearn", "pandas", "torchvision", "diffusers.models.unets.unet_1d"}
    assert unused.isdisjoint(answers["modules"])
    assert answers["aside"] == answers["imported"] and "torch._dynamo" in answers["aside"]


def test_evaluation_does_without_colossalai(answers):
    assert answers["evaluation"] == [] and answers["training"]


def test_the_compiler_works_after_all(answers):
    assert answers["found"] == [True, "module"]
    assert answers["compiled"] == [0.0, 6.0] and answers["mode"] == "ddp_optimizer"
