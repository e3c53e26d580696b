"""Command line of the pictures: ``python -m tools.pictures`` draws those that are older than their sources, or all."""

from __future__ import annotations

import argparse
import sys

from tools.pictures.table import FOLDER, PICTURES, digest, drawn, stale, write_digests


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the manual that code and records can draw.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="pictures to draw (default: the stale ones)")
    options = parser.parse_args(arguments)
    unknown = {*options.names} - {*PICTURES}
    if unknown:
        parser.error(f"no picture {unknown.pop()!r}; there are {', '.join(PICTURES)}")
    digests = drawn()
    for name in options.names or stale():
        PICTURES[name].draw(FOLDER / name)
        digests[name] = digest(name)
        print(f"drawn: {(FOLDER / name).relative_to(FOLDER.parents[1])}")
    write_digests(digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
