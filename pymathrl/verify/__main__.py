"""The command `python -m pymathrl.verify`."""

import sys

from pymathrl.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
