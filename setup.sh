#!/usr/bin/env bash
# Makes .venv and installs the pinned requirements into it. Does nothing if that was done already; an environment that
# has moved, has lost its Python or its pip, or is of another version of Python, is mended or made anew.
#   PYTHON=python3.11 bash setup.sh [--dev]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "$(uname -s)" in
  MINGW* | MSYS* | CYGWIN*)
    echo "setup.sh: this program runs on Linux; on Windows use WSL 2 ('wsl --install', then call it there)" >&2
    exit 2 ;;
esac
python="${PYTHON:-python3}"
venv=.venv

# The folder that an environment was made in is written into its scripts, and read from its activate.
made_in() { sed -n "s/^ *\(export  *\)\{0,1\}VIRTUAL_ENV=[\"']\{0,1\}\(\/[^\"']*\)[\"']\{0,1\} *$/\2/p" "$venv/bin/activate" | head -1; }
works() {
  "$venv/bin/python" -c 'import importlib.util as of, os, sys
packages = "%s/lib/python%d.%d/site-packages" % (sys.prefix, *sys.version_info[:2])
sys.exit(not os.path.isdir(packages) or of.find_spec("pip") is None)' 2>/dev/null
}

mend_venv() {
  local old here
  here="$(cd "$venv" 2>/dev/null && pwd -P || true)"
  old="$(made_in 2>/dev/null || true)"
  if [ -n "$old" ] && [ "$(realpath -m "$old")" != "$here" ]; then
    echo "setup.sh: .venv was made in $old and has moved: its scripts are adapted"
    check_writable "$venv/bin"
    local from to
    from="$(printf %s "$old" | sed 's/[][\\.*^$|]/\\&/g')" to="$(printf %s "$here" | sed 's/[\\&|]/\\&/g')"
    grep -rlIF "$old" "$venv/bin" "$venv/pyvenv.cfg" | while read -r file; do sed -i "s|$from|$to|g" "$file"; done
  fi
  works && return
  find_python
  check_writable .
  if [ -d "$venv/lib/$version/site-packages" ]; then
    echo "setup.sh: .venv has lost its Python or its pip: it gets those of $("$python" -V), and keeps its packages"
    "$venv/bin/python" -V >/dev/null 2>&1 || rm -f "$venv"/bin/python "$venv"/bin/python3*
    "$python" -m venv "$venv" && works && return
  fi
  echo "setup.sh: .venv is damaged, or of another version than $("$python" -V): it is made anew"
  rm -rf "$venv"
}

stop() { printf 'setup.sh: %s\n' "$1" >&2; exit 2; }

find_python() {
  command -v -- "$python" >/dev/null || stop "there is no $(printf %q "$python"); set PYTHON=/path/to/python3.11"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$python is $("$python" -V 2>&1), but Python 3.10 or newer is needed; set PYTHON=/path/to/python3.11"
  version="$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
}

check_writable() {  # a folder
  [ -w "$1" ] || stop "nothing can be written in $(cd "$1" && pwd): VENV=DIR bash run.sh takes an environment elsewhere"
}

pip() {  # into .venv, wherever the user's own pip installs
  env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT \
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-user "$@"
}

make_venv() {
  find_python
  check_writable .
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  "$python" -m venv "$venv" || {
    rm -rf "$venv"
    stop "$python could not make .venv: the lines above say why"
  }
}

[ ! -e "$venv" ] && [ ! -L "$venv" ] || mend_venv
[ -e "$venv" ] || make_venv
files=(requirements.txt)
[ "${1:-}" = "--dev" ] && files+=(requirements-dev.txt)
[ "${1:-}" = "--dev" ] && [ "$(uname -sm)" = "Linux x86_64" ] && files+=(requirements-triton.txt)
for file in "${files[@]}"; do
  stamp="$venv/.installed-${file%.txt}-$(cat "$file" setup.sh | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && continue
  check_writable "$venv"
  echo "setup.sh: installing $file into .venv (once; minutes on a first run)"
  into=()
  [ "$file" = requirements-triton.txt ] && into=(--no-deps --upgrade --target "$venv/triton")
  pip "${into[@]}" -r "$file"
  [ "$file" != requirements.txt ] || pip --no-deps colossalai==0.5.0
  touch "$stamp"
done
