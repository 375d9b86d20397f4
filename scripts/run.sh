#!/usr/bin/env bash
# Make the environment and train the built-in model on Countdown: minutes on two cores.
#
#   scripts/run.sh [flags of pymathrl.train]      e.g. scripts/run.sh --seed 1, scripts/run.sh --algo grpo, --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
venv=${PYMATHRL_VENV:-$here/../.venv}
case " $*" in
  *" --algo"* | *" --resume"* | *" --config"*) ;;
  *) set -- --algo rover "$@" ;;
esac
exec "$venv/bin/python" -m pymathrl.train "$@"
