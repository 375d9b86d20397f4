#!/usr/bin/env bash
# Build the extension into pymathrl/ of this source tree, with the Python of the current environment (for development
# and for machines that cannot reach a package index: needs pybind11, cmake and ninja there).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
cmake -S . -B "build/inplace" -G Ninja -DPYMATHRL_INPLACE=ON -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" "$@"
cmake --build build/inplace -j "$(nproc)"
