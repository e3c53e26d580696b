"""What a machine without network lacks to run `make gpu`, in one folder: packed here, installed there.

    python -m tools.wheelhouse pack wheels [--python 3.12]     # with network; torch, triton and numpy must be there
    python -m tools.wheelhouse install wheels                  # without; into wheels/site, nothing else is touched
    PYTHONPATH=wheels/site python -m tools.gpu facts           # or: make gpu WHEELS=wheels

A wheel of this package is among them for its entry point, by which torch finds the backend "river"; the code that runs
is that of the checkout in which a command is started. Packing refuses a folder larger than `LIMIT`. Not handled: what
torch, triton, numpy and transformers themselves need, which is on the machine where those are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 64 * 2**20  # bytes
#: With what they need.
WHOLE = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "hypothesis>=6.100")
_SYSTEM = ("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--only-binary=:all:")


def pack(folder: Path, python: str) -> int:
    """Fill a folder with wheels for a version of Python; return its bytes.

    Raises:
        ValueError: it is larger than may be carried.
        CalledProcessError: pip failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    there = ("--dest", str(folder), "--python-version", python, *_SYSTEM)
    _pip("download", "--no-deps", *there, *alone())
    _pip("download", *there, *WHOLE)
    size = sum(file.stat().st_size for file in wheels(folder))
    if size > LIMIT:
        raise ValueError(f"{folder} holds {size / 2**20:.1f} MiB, more than the {LIMIT / 2**20:.0f} that are carried")
    return size


def alone() -> tuple[str, ...]:
    """Return what is packed by itself: what it needs is large, and there."""
    from river_compile.upstream.versions import TESTED

    return f"transformers=={TESTED['transformers'].newest}.*", "torchao>=0.15"


def install(folder: Path) -> Path:
    """Installs the wheels of a folder into ``site`` below it, without network and without what they need.

    Raises:
        ValueError: there are none.
        CalledProcessError: pip failed.
    """
    found = [str(file) for file in wheels(folder)]
    if not found:
        raise ValueError(f"{folder} holds no wheels; fill it with `python -m tools.wheelhouse pack {folder}`")
    site = folder / "site"
    _pip("install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site), *found)
    return site


def wheels(folder: Path) -> list[Path]:
    """Return the wheels of a folder."""
    return sorted(folder.glob("*.whl"))


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "install"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine they are for (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.what == "pack":
            size = pack(options.folder, options.python)
            print(f"{len(wheels(options.folder))} wheels, {size / 2**20:.1f} MiB, in {options.folder}")
        else:
            print(f"PYTHONPATH={install(options.folder)}")
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
