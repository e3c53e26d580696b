"""``python -m river_compile``: the `river` command."""

import sys

from river_compile.cli.app import main

sys.exit(main())
