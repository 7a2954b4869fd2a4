"""The benchmarks' --help: what their docstring says, and every option."""

import argparse


def make_parser(doc: str, module: str) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE`, described by the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=raw)
