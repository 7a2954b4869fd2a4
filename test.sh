#!/usr/bin/env bash
# Lint, types and tests, on a CPU, without slow and GPU tests; extra arguments go to pytest (for example: -m slow).
# Says at its end what it left out and what would run that.
#   bash test.sh --interpreted    the Triton kernels by Triton's interpreter, instead of their definitions in torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --dev
if [ "${1:-}" = "--interpreted" ]; then
  shift
  TRITON_INTERPRET=1 PYTHONPATH=.venv/triton exec .venv/bin/python -m pytest tests/kernels "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m mypy
[ $# -gt 0 ] || set -- -n 3 --dist loadfile  # everything by default: three files at once, since some tests wait
exec .venv/bin/python -m pytest "$@"
