"""Measurements: `python -m bench.NAME`. docs/benchmarks.md has their results."""
