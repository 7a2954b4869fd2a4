"""What the imports of the libraries change, and change back."""

import subprocess
import sys

import torch


def test_imports_leave_nothing_behind():
    code = """
import importlib.metadata, torch
compile_, listing = torch.compile, importlib.metadata.packages_distributions
import utils.runtime.colossal, sys
assert torch.compile is compile_ and importlib.metadata.packages_distributions is listing
print("torch._inductor.compile_fx" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (
        2,
        13,
    ):  # an older diffusers or torch may import it itself
        assert result.stdout.strip() == "False"
