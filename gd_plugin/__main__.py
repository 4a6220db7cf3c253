"""``python -m gd_plugin``, for launchers that start a module: ``torchrun -m gd_plugin train ...``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
