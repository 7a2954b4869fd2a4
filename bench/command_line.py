"""The benchmarks' --help: what their docstring says, and every option; and how they start a run on several ranks."""

import argparse


def make_parser(doc: str, module: str) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE`, described by the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=raw)


def torchrun(num_ranks: int) -> list[str]:
    """What Python runs to start a script on so many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
