"""The command `python -m pymathrl.eval`."""

import sys

from pymathrl.eval.command import main

if __name__ == "__main__":
    sys.exit(main())
