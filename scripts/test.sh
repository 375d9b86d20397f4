#!/usr/bin/env bash
# Make the environment and check everything: lint, types of the package, tests. The environment is that of run.sh with
# the packages of the benches (TRL, Liger, Math-Verify) and reasoning-gym added: a few tests compare with them or use them.
#
#   scripts/test.sh [pytest arguments]            e.g. scripts/test.sh tests/ops, scripts/test.sh -k resume -x
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh" bench rg
cd "$here/.."
bin=${PYMATHRL_VENV:-$PWD/.venv}/bin
"$bin/python" -m ruff check .
"$bin/python" -m mypy
exec "$bin/python" -m pytest -rsfE "$@"
