"""Installs the programs that River is compared with: ``python -m benchmarks.peers install all``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import peers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=peers.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("list", help="say which are installed")
    names = commands.add_parser("install", help="make their environments, again where they are there")
    names.add_argument("names", nargs="+", choices=[*peers.PEERS, "all"], metavar="NAME", help=", ".join(peers.PEERS))
    options = parser.parse_args(arguments)
    if options.what == "list":
        for name in peers.PEERS:
            print(f"{name}: {peers.why_not(name) or peers.home(name)}")
        return 0
    failed = False
    for name in peers.PEERS if "all" in options.names else options.names:
        print(f"{name} ...", file=sys.stderr)
        try:
            peers.install(name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
