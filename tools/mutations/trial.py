"""One mutation: how it is described, and which test fails in a copy of the checkout that has it.

A trial never writes to the checkout. It copies what Git knows of or would add, breaks the copy, and runs pytest there
with ``PYTHONPATH`` set to the copy, so that processes which tests start import it too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s\[]+)", re.MULTILINE)


class Mutation(NamedTuple):
    """A change of the product that its tests must notice.

    Attributes:
        id: names it on the command line and in the report.
        file: relative to the checkout.
        old: occurs exactly once in it.
        new: what stands there instead.
        breaks: what goes wrong then, in one phrase.
        tests: files, or tests in them, of which one must fail.
        needs: programs without which these tests are skipped.
    """

    id: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()


class Untried(RuntimeError):
    """A trial says nothing: the mutation does not fit, a program is missing, or no test could run."""


def attempt(mutation: Mutation, root: Path = ROOT) -> str:
    """Run the tests on a mutated copy until one fails; return its name, empty if all passed.

    Raises:
        Untried: the tests say neither.
    """
    if missing := [program for program in mutation.needs if shutil.which(program) is None]:
        raise Untried(f"not installed: {', '.join(missing)}")  # (a skipped test would look like one that passes)
    source = (root / mutation.file).read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise Untried(f"{mutation.file} has {source.count(mutation.old)} times, not once: {mutation.old!r}")
    with tempfile.TemporaryDirectory(prefix="river-mutation-") as folder:
        copy = Path(folder).resolve()
        _copy(root, copy)
        (copy / mutation.file).write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        pytest = [sys.executable, "-m", "pytest", "-x", "-rfE", "-m", "not slow", "-p", "no:cacheprovider"]
        path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [*pytest, *mutation.tests], cwd=copy, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
    if done.returncode < 0:
        return f"a crash (signal {-done.returncode})"
    found = _FAILED.search(done.stdout)
    if done.returncode and not (done.returncode == 1 and found):
        raise Untried(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return found[1] if done.returncode and found else ""


def _copy(root: Path, copy: Path) -> None:
    """Copy the files that Git tracks, and those that it neither tracks nor ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # (one that was removed is still listed until that is committed)
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)
