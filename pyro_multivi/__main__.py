"""Command line as ``python -m pyro_multivi``."""

import sys

from pyro_multivi.cli import main

sys.exit(main())
