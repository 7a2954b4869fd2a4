#!/usr/bin/env bash
# Lint, types and tests, on a CPU, without slow and GPU tests; extra arguments go to pytest (for example: -m slow).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest "$@"
