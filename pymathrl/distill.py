"""python -m pymathrl.distill: a hybrid out of a transformer, distilled from it. The command is `pymathrl.sft` in its
mode distill: rows, evaluation, checkpoints and options are those of every supervised run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pymathrl.sft.command import main as supervised


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code as of `pymathrl.sft`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return supervised(words if "--resume" in words else ["--mode", "distill", *words])


if __name__ == "__main__":
    sys.exit(main())
