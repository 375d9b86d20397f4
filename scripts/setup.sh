#!/usr/bin/env bash
# Make the environment of this repository, or bring it up to date: a virtual environment with the versions of
# constraints.txt and an editable install of pymathrl with its extension. Quick when nothing it depends on has changed,
# so the other scripts call it each time; it also rebuilds the extension after an edit in csrc/.
#
#   scripts/setup.sh [EXTRA ...]     EXTRA: more of pyproject's optional dependencies than `test`, e.g. bench
#
#   PYMATHRL_VENV   where the environment lies (default: .venv in the repository)
#   PYTHON          the interpreter it is made with (default: the first of python3, python3.13 .. 3.11 that is >= 3.11)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=${PYMATHRL_VENV:-$root/.venv}
extras=$({ printf '%s\n' test "$@"; cat "$venv/pymathrl.extras" 2>/dev/null || true; } | sort -u | paste -sd, -)

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of 3.11 or newer ($("$PYTHON" --version 2>&1 || true))"
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11 python; do
    if new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  fail "pymathrl needs Python 3.11 or newer, python3 here is: $(python3 --version 2>&1 || true); install one, or name it: PYTHON=/path/to/python scripts/setup.sh"
}

# What the environment depends on. A new Python file needs no new install: the editable install looks into the tree.
stamp() {
  {
    printf '%s\n' "$root" "$extras" "$("$venv/bin/python" --version)"
    find pyproject.toml constraints.txt CMakeLists.txt csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d' ' -f1
}

case $venv in /*) ;; *) fail "PYMATHRL_VENV must be an absolute path, got $venv" ;; esac
known=$(sed -n '/^\[project.optional-dependencies\]/,/^\[tool/s/^\([a-z]*\) = \[.*/\1/p' pyproject.toml)
for name in "$@"; do
  grep -qx "$name" <<<"$known" || fail "pyproject.toml has no optional dependencies called '$name'; it has $(paste -sd' ' <<<"$known")"
done
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/pymathrl.stamp" 2>/dev/null || true)" = "$(stamp)" ]; then
  exit 0
fi

command -v "${CXX:-c++}" g++ clang++ >/dev/null ||
  fail "no C++ compiler found (looked for ${CXX:-c++}, g++, clang++); install one, e.g. the package g++"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv exists and is no virtual environment; remove it, or set PYMATHRL_VENV to another folder"
  fi
  python=$(find_python)
  say "making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi
new_enough "$venv/bin/python" ||
  fail "$venv holds $("$venv/bin/python" --version), pymathrl needs 3.11 or newer; remove it and run this again"

# Both variables: newer pips constrain the build environment by the second one only. Relative on purpose: pip splits the
# value at spaces, which the path of the repository may hold.
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# --no-compile: byte code of the few modules that are imported is made at their first import; that of all of them takes
# three times as long as the rest of torch's install (28 s of processor time against 7 s).
install() { # WHAT ARGS...: pip install ARGS, with a line before and the time after
  local what=$1 begin=$SECONDS
  shift
  say "installing $what"
  "$venv/bin/python" -m pip install -qq --no-compile "$@" </dev/null || fail "could not install $what; the lines above say why"
  say "  done in $((SECONDS - begin)) s"
}
torch=$(grep '^torch==' constraints.txt)
install "$torch (200 MB on a CPU, several GB with CUDA)" "$torch"
install "pymathrl and what it needs ($extras); this compiles the extension" -e ".[$extras]"
tr , '\n' <<<"$extras" > "$venv/pymathrl.extras" # so that a later call without them keeps them
stamp > "$venv/pymathrl.stamp"
say "ready: $venv"
