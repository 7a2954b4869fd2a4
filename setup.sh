#!/usr/bin/env bash
# Makes .venv and installs the pinned requirements into it. Does nothing where that was done already.
#   PYTHON=python3.11 bash setup.sh [--dev]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "setup.sh: $python is $("$python" -V 2>&1), but Python 3.10 or newer is needed; set PYTHON=/path/to/python3.11" >&2
  exit 2
}
files=(requirements.txt)
[ "${1:-}" = "--dev" ] && files+=(requirements-dev.txt)
[ "${1:-}" = "--dev" ] && [ "$(uname -sm)" = "Linux x86_64" ] && files+=(requirements-triton.txt)
for file in "${files[@]}"; do
  stamp=".venv/.installed-${file%.txt}-$(cat "$file" setup.sh | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && continue
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "setup.sh: installing $file into .venv (once; minutes on a first run)"
  into=()
  [ "$file" = requirements-triton.txt ] && into=(--no-deps --upgrade --target .venv/triton)
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${into[@]}" -r "$file"
  if [ "$file" = requirements.txt ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps colossalai==0.5.0
  fi
  touch "$stamp"
done
