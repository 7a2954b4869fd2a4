"""Measurements: `python -m bench.NAME`. docs/benchmarks.md has their results."""

import utils as utils  # says so first if this Python is too old
