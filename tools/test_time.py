"""Says where the time of a test run goes: by folder, file, phase and cause.

    python -m pytest -p tools.test_time -n 2 ...     # writes a line for each test into .test_time/
    python -m tools.test_time                        # prints the tables of the last run

A cause is counted by itself: the seconds that Dynamo spends in our backend are the backend's, those that the backend
spends in Inductor are Inductor's. What no cause claims is the tests' own Python and the models' operators.

Not handled: time spent in the processes that tests start, which is the cause "subprocesses" as a whole.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

FOLDER = Path(".test_time")

# Where a cause begins and ends: (cause, module, attribute).
_CAUSES = [
    ("Dynamo", "torch._dynamo.convert_frame", "_compile"),
    ("Inductor", "torch._inductor.compile_fx", "compile_fx"),
    ("River's build", "river_compile.backend", "build"),
    ("River's C++ builds", "river_compile.kernels.native.build", "_run"),
    ("Triton's interpreter", "triton.runtime.interpreter", "GridExecutor.__call__"),
    ("Triton's compiler", "triton.compiler.compiler", "compile"),
    ("subprocesses", "subprocess", "Popen.communicate"),
    ("subprocesses", "subprocess", "Popen.wait"),
    ("loading models", "transformers.modeling_utils", "PreTrainedModel.from_pretrained"),
]


class _Clock:
    """Seconds by cause, of the innermost one at each time."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1] if self._stack else "tests and operators"] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        self._charge()
        taken, self.seconds = dict(self.seconds), Counter()
        return taken

    def wrapped(self, cause: str, function: Any) -> Any:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._stack.append(cause)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._stack.pop()

        return timed


class _Plugin:
    """Writes what each phase of each test took."""

    def __init__(self, file: Path) -> None:
        self._clock = _Clock()
        self._file = file.open("w")
        for cause, module, name in _CAUSES:
            owner: Any = importlib.import_module(module)
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            function = owner.__dict__[last]
            if isinstance(function, classmethod):
                setattr(owner, last, classmethod(self._clock.wrapped(cause, function.__func__)))
            else:
                setattr(owner, last, self._clock.wrapped(cause, function))

    def pytest_runtest_logreport(self, report: Any) -> None:
        line = {"test": report.nodeid, "phase": report.when, "seconds": report.duration, "causes": self._clock.take()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def pytest_configure(config: Any) -> None:
    """Register the clock in each process that runs tests."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        FOLDER.mkdir(exist_ok=True)
        for old in FOLDER.glob("*.jsonl"):
            old.unlink()
    if worker is not None or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(_Plugin(FOLDER / f"{worker or 'main'}.jsonl"))


def _table(title: str, seconds: dict[str, float], rows: int = 1000) -> None:
    total = sum(seconds.values())
    print(f"\n| {title} | seconds | share |\n|---|---:|---:|")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1])[:rows]:
        print(f"| {name} | {value:.0f} | {value / total:.0%} |")


def main() -> int:
    """Print the tables of the last run."""
    lines = [json.loads(line) for file in sorted(FOLDER.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if not lines:
        print(f"{FOLDER} is empty: run python -m pytest -p tools.test_time first", file=sys.stderr)
        return 1
    causes: Counter[str] = Counter()
    by: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        file = line["test"].split("::")[0].removeprefix("tests/")
        causes.update(line["causes"])
        by["folder"][file.split("/")[0]] += line["seconds"]
        by["file"][file] += line["seconds"]
        by["phase"][line["phase"]] += line["seconds"]
        by["test"][line["test"].removeprefix("tests/")] += line["seconds"]
    print(f"{len(by['test'])} tests, {sum(by['phase'].values()):.0f} s of all processes together")
    _table("cause", causes)
    for title in ("phase", "folder"):
        _table(title, by[title])
    _table("file", by["file"], 40)
    _table("test", by["test"], 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
