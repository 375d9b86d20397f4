#!/usr/bin/env bash
# Makes the built-in hybrid from the built-in model: three of its four layers become Mamba layers, which learn to say what
# it says (reverse KL) on worked solutions of Countdown. 10 to 30 minutes on one core. Held-out problems are not among
# them. The seed fixes everything: the same machine gives the same weights.
#
#   scripts/make_builtin_m1.sh [FOLDER]     the folder of the model [pymathrl/assets/tiny-m1]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-pymathrl/assets/tiny-m1}
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
"${PYTHON:-python}" -m pymathrl.distill --model builtin:tiny --attention-layers 1 --steps 2000 --lr 4e-3 \
  --warmup-steps 100 --weight-decay 0.01 --rows-per-step 64 --threads 1 --eval-problems 128 --eval-samples 8 \
  --eval-problems-during 64 --eval-samples-during 8 --eval-every 500 --checkpoint-every 500 --out "$run/distill"
mkdir -p "$out"
cp "$run"/distill/checkpoints/step-2000/*.* "$out/"
echo "wrote $out"
