"""``python -m fcos`` and ``torchrun -m fcos``."""

import sys

from fcos.cli import main

if __name__ == "__main__":
    sys.exit(main())
