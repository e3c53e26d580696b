"""One mutation: how it is described, a copy of the checkout that has it, and which of the copy's tests fails.

A trial never writes to the checkout. It copies what Git knows of or would add, breaks the copy, and runs pytest there
with ``PYTHONPATH`` set to the copy, so that processes which tests start import it too.

Not handled: tests marked slow, which the default run leaves out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OWN_TEST = "tests/tools/test_mutations.py"  # says that the sources are as the table has them, which a mutation changes
_FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s\[]+)", re.MULTILINE)
_INSIDE = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"


class Mutation(NamedTuple):
    """A change of the product that its tests must notice.

    Attributes:
        id: names it on the command line and in the report.
        file: relative to the checkout.
        old: occurs exactly once in it.
        new: what stands there instead.
        breaks: what goes wrong then, in one phrase.
        tests: files, or tests in them, that are likely to notice; they run first.
    """

    id: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def unfit(self, root: Path = ROOT) -> str:
        """Return why it does not fit a checkout, empty if it does."""
        path = root / self.file
        if not path.is_file():
            return f"{self.id}: there is no {self.file}"
        found = path.read_text(encoding="utf-8").count(self.old)
        return "" if found == 1 else f"{self.id}: {self.file} has {found} times, not once: {self.old!r}"


class Outcome(NamedTuple):
    """What became of one mutation.

    Attributes:
        noticed_by: the test that failed first, or that the process crashed; empty if all passed.
        problem: why the trial says nothing (tests that could not be collected, say), empty if it does.
        seconds: wall time of the trial.
    """

    mutation: Mutation
    noticed_by: str
    problem: str
    seconds: float


def attempt(mutation: Mutation, whole: bool, root: Path = ROOT) -> Outcome:
    """Run the tests on a mutated copy until one fails.

    Args:
        mutation: fits the checkout.
        whole: whether the rest of the default run follows if the likely tests pass.
        root: the checkout.
    """
    start = time.perf_counter()
    noticed_by = problem = ""
    with tempfile.TemporaryDirectory(prefix="river-mutation-") as folder:
        copy = Path(folder).resolve()
        _copy(root, copy)
        path = copy / mutation.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        _check_import(mutation.file, copy)
        rest = [f"--ignore={OWN_TEST}", *(f"--deselect={test}" for test in mutation.tests)]
        for selection in (mutation.tests, rest) if whole else (mutation.tests,):
            noticed_by, problem = _first_failure(copy, selection)
            if noticed_by or problem:
                break
    return Outcome(mutation, noticed_by, problem, time.perf_counter() - start)


def _copy(root: Path, copy: Path) -> None:
    """Copy the files that Git tracks, and those that it neither tracks nor ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # (one that was removed is still listed until that is committed)
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)


def _check_import(file: str, copy: Path) -> None:
    """Make sure that a process which starts anywhere imports a file, or the package around it, from the copy."""
    path = Path(file)
    while path.suffix != ".py" and not (copy / path / "__init__.py").is_file():
        path = path.parent
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    module = f"river_compile.{module}" if path.parts[0] in ("passes", "kernels") else module
    command = [sys.executable, "-c", _INSIDE, module]
    found = subprocess.run(command, cwd=copy.parent, env=_environment(copy), capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(copy), f"{module} is imported from {found.stdout.strip()}"


def _environment(copy: Path) -> dict[str, str]:
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{others}" if others else str(copy)}


def _first_failure(copy: Path, selection: Sequence[str]) -> tuple[str, str]:
    """Return which test of a copy fails first, if any, and why that is unknown, if it is."""
    pytest = [sys.executable, "-m", "pytest", "-x", "-rfE", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([*pytest, *selection], cwd=copy, env=_environment(copy), capture_output=True, text=True)
    if done.returncode == 0:
        return "", ""
    if done.returncode < 0:
        return f"a crash (signal {-done.returncode})", ""
    found = _FAILED.search(done.stdout)
    if done.returncode == 1 and found:
        return found[1], ""
    return "", f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
