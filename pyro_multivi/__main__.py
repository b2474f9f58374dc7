"""``python -m pyro_multivi`` is the command line."""

import sys

from pyro_multivi.cli import main

sys.exit(main())
