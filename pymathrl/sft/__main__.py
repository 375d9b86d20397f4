"""python -m pymathrl.sft, see `command`."""

import sys

from pymathrl.sft.command import main

sys.exit(main())
