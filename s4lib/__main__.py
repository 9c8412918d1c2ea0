"""`python -m s4lib` is `s4`; torchrun starts this module."""

import sys

from .cli import main

sys.exit(main())
