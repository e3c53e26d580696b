"""Runs the core of the tests with other versions, each in a fresh environment: ``python -m tools.compat``.

A corner is a Python and what pip installs there; its tests are those marked "core". A corner whose Python is not on
this machine is skipped, and says so. The exit status is the number of corners that failed, or 1 where none ran. An
environment takes some 5 GB for as long as its tests run, because torch's default builds bring CUDA.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers")
PASSED, FAILED, SKIPPED = "passed", "FAILED", "not available here"
_MINUTES = 60  # for the tests of one corner


class Corner(NamedTuple):
    """Versions that are tested together; pip's requirements besides those of ``pyproject.toml``.

    torch's own requirements pin Triton: 3.6.0 with 2.11, 3.7.1 with 2.12.
    """

    name: str
    python: str
    requirements: tuple[str, ...]


CORNERS = (
    Corner("oldest", "3.10", ("torch==2.11.0", "transformers==5.17.0")),
    Corner("oldest, newer Python", "3.12", ("torch==2.11.0", "transformers==5.17.0")),
    Corner("middle", "3.12", ("torch==2.12.1", "transformers==5.20.2")),
    Corner("newest", "3.13", ("torch", "transformers")),
)


def find_python(version: str) -> str | None:
    """Return an interpreter of a version ("3.10") that can build what is needed: from PATH, pyenv or uv."""
    homes = {"PYENV_ROOT": "~/.pyenv", "UV_PYTHON_INSTALL_DIR": "~/.local/share/uv/python"}
    kept = [Path(os.environ.get(name) or default).expanduser() for name, default in homes.items()]
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders += [found for home in kept for found in sorted(home.glob(f"**/*{version}.*/bin"))]
    for python in (str(folder / f"python{version}") for folder in folders):
        works = [python, "-c", f"import sys; assert sys.version_info[:2] == ({version.replace('.', ', ')})"]
        # (A shim of a version that is not there fails here.)
        if os.path.exists(python) and _status(works) == 0 and _status([python, "tools/check_machine.py"]) == 0:
            return python
    return None


def run_corner(corner: Corner, folder: Path) -> str:
    """Make a corner's environment in a folder and run the tests there; return what became of it."""
    python = find_python(corner.python)
    if python is None:
        return SKIPPED
    inside = str(folder / "env/bin/python")
    install = [inside, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test]", *corner.requirements]
    versions = [inside, "-m", "pip", "show", "--quiet", *PACKAGES]
    if any(_status(command) for command in ([python, "-m", "venv", str(folder / "env")], install, versions)):
        return FAILED
    tests = [inside, "-m", "pytest", "-m", "core", "--tools", "-p", "no:cacheprovider"]
    caches = {"RIVER_COMPILE_HOME": folder / "cache", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    try:
        return FAILED if _status(tests, **{name: str(path) for name, path in caches.items()}) else PASSED
    except subprocess.TimeoutExpired:
        return FAILED


def _status(command: list[str], **environment: str) -> int:
    """Run a command in the checkout, its output shown; return its status."""
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=_MINUTES * 60).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    known = {corner.name: corner for corner in CORNERS}
    parser = argparse.ArgumentParser(description="Runs the core of the tests with other versions.")
    parser.add_argument("corners", nargs="*", metavar="corner", help=f"of {', '.join(known)}; all")
    options = parser.parse_args(arguments)
    unknown = {*options.corners} - {*known}
    if unknown:
        parser.error(f"no corner {unknown.pop()!r}; there are {', '.join(map(repr, known))}")
    outcomes = {}
    for name in options.corners or known:
        with tempfile.TemporaryDirectory(prefix="river-compat-") as folder:
            outcomes[name] = run_corner(known[name], Path(folder))
        print(f"{name}: {outcomes[name]}", flush=True)
    print("\n" + "\n".join(f"| {name} | {outcome} |" for name, outcome in outcomes.items()))
    failed = [*outcomes.values()].count(FAILED)
    return failed or int(PASSED not in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
