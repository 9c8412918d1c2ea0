"""`python -m s4lib` is `s4`; torchrun starts this module."""

import sys

from .cli import main

if __name__ == "__main__":  # not in a process that this one starts
    sys.exit(main())
