"""What the imports of the libraries change and change back, and what they leave out."""

import subprocess
import sys

import pytest
import torch

from tests.helpers.script import ROOT

LATER_STACK = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_leave_nothing_behind():
    code = """
import importlib.metadata, torch
compile_, listing = torch.compile, importlib.metadata.packages_distributions
is_available = torch.distributed.is_available
import utils.runtime.colossal, sys
assert torch.compile is compile_ and importlib.metadata.packages_distributions is listing
assert torch.distributed.is_available is is_available
assert not [name for name, module in sys.modules.items() if module is None and "." not in name]
assert not [name for name in sys.modules if "torch_fsdp_plugin" in name or name.partition(".")[0] == "galore_torch"]
"""
    run(code)


@pytest.mark.skipif(not LATER_STACK, reason="older libraries import more")
def test_what_nothing_uses_is_not_imported():
    code = """
import sys
import utils.runtime.colossal
from utils.runtime.aside import Aside
found_only = ("peft", "bitsandbytes", "sklearn", "pandas", "torchvision", "diffusers.models.unets.unet_1d")
print([name for name in ("sympy", "torch._inductor", "torch.distributed.tensor", *found_only) if name in sys.modules])
print(type(sys.modules["torch._dynamo"]).__name__, type(sys.modules.get("scipy")) in (Aside, type(None)))
"""
    assert run(code).splitlines() == ["[]", "Aside True"]


def test_evaluation_does_without_colossalai():
    code = "import sys; import utils.evaluation.generate, utils.evaluation.score; print('colossalai' in sys.modules)"
    assert run(code) == "False\n"


def test_the_compiler_works_after_all():
    code = """
import utils.runtime.colossal
import torch
import torch._dynamo.utils
print(torch._dynamo.utils is __import__("sys").modules["torch._dynamo.utils"], type(torch._dynamo).__name__)
compiled = torch.compile(lambda x: (x * 2).relu(), backend="eager")
print(compiled(torch.tensor([-1.0, 3.0])).tolist(), torch._dynamo.utils.get_optimize_ddp_mode())
"""
    assert run(code).splitlines() == ["True module", "[0.0, 6.0] ddp_optimizer"]
