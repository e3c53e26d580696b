"""Runs the core of the tests with other versions, each in a fresh environment: ``python -m tools.compat``.

A corner is a Python and what pip installs there. Its tests are those marked "core"; ``--keep FOLDER`` leaves the
environments for a look at them. A corner whose Python is not on this machine is skipped in plain sight, and counts as
neither passed nor failed; pip's own settings say where packages come from. The exit status is the number of corners
that failed, or 1 where none ran.

Every environment takes some 5 GB for as long as its tests run, because torch's default builds bring CUDA.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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


class Outcome(NamedTuple):
    """What became of a corner: the versions that were installed, and pytest's last line or what went wrong."""

    corner: Corner
    status: str
    versions: dict[str, str]
    says: str
    seconds: float


def find_python(version: str) -> str | None:
    """Return an interpreter of a version ("3.10"): from PATH, or one that pyenv or uv keeps; None without one."""
    homes = {"PYENV_ROOT": "~/.pyenv", "UV_PYTHON_INSTALL_DIR": "~/.local/share/uv/python"}
    kept = [Path(os.environ.get(name) or default).expanduser() for name, default in homes.items()]
    patterns = (f"versions/{version}.*/bin/python{version}", f"cpython-{version}.*/bin/python{version}")
    found = [str(path) for home in kept for pattern in patterns for path in sorted(home.glob(pattern))]
    return next(filter(lambda path: _runs(path, version), [*_on_path(version), *found]), None)


def run_corner(corner: Corner, folder: Path) -> Outcome:
    """Make a corner's environment in a folder and run the tests there."""
    start = time.perf_counter()

    def outcome(status: str, says: str, versions: dict[str, str] | None = None) -> Outcome:
        return Outcome(corner, status, versions or {}, says, time.perf_counter() - start)

    python = find_python(corner.python)
    if python is None:
        return outcome(SKIPPED, f"no Python {corner.python} on this machine")
    inside = str(folder / "env/bin/python")
    made = _call([python, "-m", "venv", str(folder / "env")])
    install = [inside, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test]", *corner.requirements]
    made = made if made.returncode else _call(install)
    if made.returncode:
        return outcome(FAILED, f"pip: {_last_line(made.stdout)}")
    versions = _versions(inside)
    tests = [inside, "-m", "pytest", "-m", "core", "--tools", "-p", "no:cacheprovider"]
    environment = {"RIVER_COMPILE_HOME": folder / "cache", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    ran = _call(tests, _MINUTES * 60, **{name: str(path) for name, path in environment.items()})
    (folder / "pytest.log").write_text(ran.stdout, encoding="utf-8")
    if ran.returncode:
        print(ran.stdout, file=sys.stderr)
    return outcome(FAILED if ran.returncode else PASSED, _last_line(ran.stdout), versions)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    head = ("corner", "Python", *PACKAGES, "outcome", "seconds", "")
    rows = [
        (corner.name, corner.python, *(versions.get(p, "") for p in PACKAGES), status, f"{seconds:.0f}", says)
        for corner, status, versions, says, seconds in outcomes
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return how many corners failed; 1 where not one ran, which shows nothing."""
    failed = sum(outcome.status == FAILED for outcome in outcomes)
    return failed or int(all(outcome.status == SKIPPED for outcome in outcomes))


def _on_path(version: str) -> Iterator[str]:
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = shutil.which(f"python{version}", path=folder)
        if path is not None:
            yield path


def _runs(python: str, version: str) -> bool:
    """Whether it is that version and can build what is needed; a shim of a version that is not there is none."""
    said = _call([python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]).stdout.strip()
    return said == version and _call([python, "tools/check_machine.py"]).returncode == 0


def _versions(python: str) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    return dict(zip(PACKAGES, _call([python, "-c", code, *PACKAGES]).stdout.split(), strict=True))


def _call(command: list[str], limit: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout; what it printed is one text. Running out of time is a failure like others."""
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        so_far = (error.output or b"").decode(errors="replace")  # (bytes, whatever was asked for)
        return subprocess.CompletedProcess(command, 1, f"{so_far}\nmore than {limit:.0f} s")


def _last_line(text: str) -> str:
    return re.sub(r"[|=]+", " ", (text.strip().splitlines() or [""])[-1]).strip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Runs the core of the tests with other versions.")
    parser.add_argument("corners", nargs="*", metavar="corner", help=f"of {', '.join(c.name for c in CORNERS)}; all")
    parser.add_argument("--keep", type=Path, help="a folder that the environments stay in")
    options = parser.parse_args(arguments)
    unknown = set(options.corners) - {corner.name for corner in CORNERS}
    if unknown:
        parser.error(f"no corner {unknown.pop()!r}; there are {', '.join(repr(c.name) for c in CORNERS)}")
    outcomes = []
    for corner in CORNERS:
        if options.corners and corner.name not in options.corners:
            continue
        with tempfile.TemporaryDirectory(prefix="river-compat-") as scratch:
            folder = Path(scratch) if options.keep is None else options.keep / re.sub(r"\W+", "-", corner.name)
            folder.mkdir(parents=True, exist_ok=True)
            outcomes.append(run_corner(corner, folder))
        print(table(outcomes[-1:]), flush=True)
    print(f"\n{table(outcomes)}")
    return exit_status(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
