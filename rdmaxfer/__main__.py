"""`python -m rdmaxfer`: the command line."""

import sys

from rdmaxfer.cli import main

sys.exit(main())
