#!/usr/bin/env bash
# The program on several stacks, each in a virtual environment of its own below LEGS_DIR (.legs; up to 6 GB a leg):
#   default   requirements.txt, in .venv (or VENV)     upstream  requirements-upstream.txt, ColossalAI's own pins
#   newest    requirements.txt without its pins
#   python3.10, python3.12, python3.13                 requirements.txt with that Python, if this machine has it
# On each: the golden trajectory and run.sh with ten steps; then every leg samples the pipelines of all of them.
#   bash tests/stacks/matrix.sh [--brief | --install] [LEG...]   --brief: no run.sh; --install: nothing is run, only
#                                                             installed; all legs where none is named
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
legs_dir="$(realpath -m "${LEGS_DIR:-.legs}")"
brief='' only_install=''
case "${1:-}" in --brief) brief=1; shift ;; --install) only_install=1; shift ;; esac
unset PYTHONDONTWRITEBYTECODE  # what is imported is compiled once, not all that is installed
[ $# -gt 0 ] || set -- default upstream newest python3.10 python3.12 python3.13
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

requirements() {
  case "$1" in
    upstream) cat requirements-upstream.txt ;;
    newest) sed 's/==[^ ]*//' requirements.txt ;;
    python3.*) cat requirements.txt ;;
    *) echo "matrix.sh: there is no leg $1, only default, upstream, newest and python3.N" >&2; exit 2 ;;
  esac
}

python_of() {  # LEG: the interpreter for its environment; fails if there is none
  case "$1" in
    python3.*) for found in "$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/${1#python}".*/bin/python; do
        if "$found" -c 'import venv' 2> /dev/null; then echo "$found"; return; fi
      done; return 1 ;;
    *) echo "${PYTHON:-python3}" ;;
  esac
}

venv_of() { if [ "$1" = default ]; then echo "${VENV:-.venv}"; else echo "$legs_dir/$1/venv"; fi; }

install() {  # LEG: as setup.sh does it, again only where the list has changed
  if [ "$1" = default ]; then [ -n "${VENV:-}" ] || bash setup.sh; return; fi
  local venv="$legs_dir/$1/venv" list="$legs_dir/$1/requirements.txt"
  requirements "$1" > "$list.new"
  if [ -e "$venv/.installed" ] && cmp -s "$list.new" "$list"; then return; fi
  rm -f "$venv/.installed"
  mv "$list.new" "$list"
  [ -x "$venv/bin/python" ] || "$(python_of "$1")" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$list"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps colossalai==0.5.0
  touch "$venv/.installed"
}

check() {  # LEG
  rm -rf "$legs_dir/$1"/{golden,output,result}
  "$(venv_of "$1")/bin/python" -m tests.stacks.matrix run "$legs_dir" "$1" || return 1
  [ -z "$brief" ] || return 0
  VENV="$(venv_of "$1")" OUTPUT_DIR="$legs_dir/$1/output" RESULT_DIR="$legs_dir/$1/result" MAX_TRAIN_STEPS=10 \
    NUM_INFERENCE_STEPS=5 NUM_IMAGES=2 bash run.sh
}

failed=() legs=()
for leg in "$@"; do
  if python_of "$leg" > /dev/null; then legs+=("$leg"); else echo "=== $leg: not run: there is no $leg here"; fi
done
set -- "${legs[@]}"
for leg in "$@"; do
  echo "=== $leg: installing"
  mkdir -p "$legs_dir/$leg"
  install "$leg"
  [ -z "$only_install" ] || continue
  echo "=== $leg: running"
  check "$leg" || failed+=("$leg")
done
[ -z "$only_install" ] || exit 0
for leg in "$@"; do
  "$(venv_of "$leg")/bin/python" -m tests.stacks.matrix sample "$legs_dir" "$leg" "$@" || failed+=("$leg")
done
[ ${#failed[@]} -eq 0 ] || { echo "matrix.sh: failed: ${failed[*]}" >&2; exit 1; }
"$(venv_of "$1")/bin/python" -m tests.stacks.matrix table "$legs_dir" "$@"
