#!/usr/bin/env bash
# All that needs an NVIDIA GPU: build in place with the Python, torch and tools of this machine (no network, no virtual
# environment), then the parts named, or all. Each part ends within 8 minutes, or is stopped there and counts as failed.
#
#   scripts/gpu_suite.sh [--out DIR] [tests] [sanitizer] [bench] [generation] [learn]
#
#   tests      the GPU tests, and every op test
#   sanitizer  compute-sanitizer, memcheck and racecheck, over each op once
#   bench      every bench/bench_*.py
#   generation the engine against transformers, and against nano-vllm where it is installed
#   learn      a short ROVER run of the built-in model on Countdown
#
# Results: DIR/<gpu>-<date>.json and .md (default bench/results), one entry per part, kept from run to run of a day; logs
# in DIR/logs. PYTHON names the interpreter (default python3). Exit: 0 all passed, 1 a part failed, 2 cannot run here.
set -euo pipefail
out=
parts=()
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { printf 'gpu_suite: %s\n' "$*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --out)
      [ $# -ge 2 ] || fail "--out needs a folder"
      case $2 in /*) out=$2 ;; *) out=$caller/$2 ;; esac
      shift
      ;;
    tests | sanitizer | bench | generation | learn) parts+=("$1") ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "scripts/gpu_suite.sh"; exit 0 ;;
    *) fail "unknown part '$1'; parts are tests, sanitizer, bench, generation, learn" ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer bench generation learn)
out=${out:-$PWD/bench/results}
python=${PYTHON:-python3}
limit_s=480 # of a part: with the build and the start well under 9 minutes

"$python" - <<'PYTHON' || exit 2
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_suite: {sys.executable} has no torch ({error}); name another interpreter with PYTHON=")
if not torch.cuda.is_available():
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    sys.exit(f"gpu_suite: torch {torch.__version__} ({build}) sees no NVIDIA GPU here; nothing was run")
major, minor = torch.cuda.get_device_capability()
print(f"gpu_suite: {torch.cuda.get_device_name()} (sm_{major}{minor}), torch {torch.__version__}, Python {sys.version.split()[0]}")
PYTHON

need=(pybind11 numpy safetensors tokenizers jinja2 sympy rich matplotlib)
for part in "${parts[@]}"; do
  case $part in
    tests) need+=(pytest pytest_timeout hypothesis transformers tensorboard) ;;
    learn) need+=(tensorboard) ;;
    generation) need+=(transformers) ;;
    sanitizer) command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is not on the PATH (part of the CUDA toolkit)" ;;
  esac
done
"$python" - "${need[@]}" <<'PYTHON' || exit 2
import importlib.util, sys
missing = sorted({name for name in sys.argv[1:] if importlib.util.find_spec(name) is None})
if missing:
    sys.exit(f"gpu_suite: {sys.executable} lacks {', '.join(missing)}; install them, or put their unpacked wheels on PYTHONPATH")
PYTHON
for tool in cmake ninja nvcc; do
  command -v "$tool" >/dev/null || fail "$tool is not on the PATH"
done

mkdir -p "$out/logs" || fail "cannot make $out/logs; name another folder with --out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=$python scripts/build.sh >"$out/logs/build.log" 2>&1 || { tail -40 "$out/logs/build.log"; fail "the build failed; the whole log: $out/logs/build.log"; }
"$python" -c '
import sys, torch
from pymathrl import _C
if not _C.has_cuda:
    sys.exit("gpu_suite: the extension was built without CUDA: CMake found no working nvcc")
print("gpu_suite: built", _C.__file__)' || exit 2

run_tests() {
  "$python" -m pytest -p no:cacheprovider -rsfE -m gpu --durations=5 tests || return
  "$python" -m pytest -p no:cacheprovider -rsfE -m "not gpu" tests/ops
}

# Only the kernels of this package, not torch's; each allocation on its own, so that one tensor's end is the memory's end.
# First a planted overrun: were it not found, the silence after it would mean nothing.
run_sanitizer() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local check=(compute-sanitizer --kernel-name kernel_substring=pymathrl --error-exitcode 9 --report-api-errors no)
  local status=0
  "${check[@]}" --tool memcheck --print-limit 1 "$python" tests/gpu_ops_once.py --planted-overrun >"$out/logs/planted.log" 2>&1 || status=$?
  if ! grep -q 'Invalid __global__ read' "$out/logs/planted.log"; then
    tail -20 "$out/logs/planted.log"
    echo "memcheck did not report the planted overrun (exit $status): it does not work on this machine"
    return 1
  fi
  echo "memcheck reports the planted overrun"
  "${check[@]}" --tool memcheck "$python" tests/gpu_ops_once.py || return
  "${check[@]}" --tool racecheck "$python" tests/gpu_ops_once.py || return
  echo "memcheck and racecheck: no errors in any op"
}

run_bench() {
  local file status=0
  for file in bench/bench_*.py; do
    echo "== $file"
    "$python" "$file" --device cuda || { echo "$file failed"; status=1; }
  done
  [ $status -ne 0 ] || echo "all benches ran, each after its check against the reference"
  return $status
}

run_generation() {
  local status=0
  "$python" bench/vs_hf_generate.py --device cuda || status=1
  "$python" bench/b4_generation.py --device cuda || status=1
  return $status
}

run_learn() {
  local folder
  folder=$(mktemp -d)
  "$python" -m pymathrl.train --algo rover --device cuda --steps 20 --out "$folder/run" </dev/null || return
  "$python" - "$folder/run/summary.json" <<'PYTHON'
import json, sys
s = json.load(open(sys.argv[1]))
print(f"pass@1 {s['before']['pass@1']:.3f} -> {s['after']['pass@1']:.3f}, {s['tokens_per_second']:.0f} tokens/s, {s['wall_s']:.0f} s")
sys.exit(0 if s["after"]["pass@1"] > s["before"]["pass@1"] else "pass@1 did not rise")
PYTHON
}

# `timeout` needs a program: a part runs in a shell of its own that has these functions.
export python out
export -f run_tests run_sanitizer run_bench run_generation run_learn
failed=()
for part in "${parts[@]}"; do
  echo "gpu_suite: $part"
  log=$out/logs/$part.log
  begin=$SECONDS
  rc=0
  timeout --kill-after=10 $limit_s bash -c "set -uo pipefail; run_$part" </dev/null 2>&1 | tee "$log" || rc=$?
  "$python" scripts/collect_bench.py --part "$part" --rc "$rc" --seconds $((SECONDS - begin)) --out "$out" "$log"
  [ "$rc" -eq 0 ] || failed+=("$part")
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu_suite: failed: ${failed[*]} (logs in $out/logs)"; exit 1; }
echo "gpu_suite: all passed: ${parts[*]}"
