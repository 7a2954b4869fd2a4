"""Numbers on the command line: each function parses one and says what is wrong with it."""

import argparse
import math


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _bounded(int, text, 1)


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    return _bounded(int, text, 0)


def seed_int(text: str) -> int:
    """An integer in [0, 2**32): what every generator takes."""
    value = _bounded(int, text, 0)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**32")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _bounded(float, text, 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _bounded(float, text, 0)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def unit_float(text: str) -> float:
    """A number in [0, 1)."""
    value = _bounded(float, text, 0)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def _bounded(kind: type, text: str, least: int):
    try:
        value = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
    return value
