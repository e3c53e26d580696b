"""Measured numbers as records, one a line of ``benchmarks/results/NAME.jsonl``, from which documents are filled.

A record has the benchmark, model, row, key, value (a number or a word) and unit; machine, commit, date and command.
"""

from __future__ import annotations

import datetime
import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from river_compile.kernels.files import atomic_write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_MEASURED = ("benchmark", "model", "dtype", "new_tokens", "repeats", "batch")  # of an outcome, where it has them
_GROUPS = ("rows", "kinds", "contexts")  # what the parts of an outcome are called that name no row
_MACHINE = ("cpu", "threads", "instruction_set")  # two machines differ in one of these
_UNITS = {"tokens_per_s": "tokens/s", "bytes_per_s": "bytes/s", "_ms": "ms", "_s": "s", "bytes": "bytes"}


def write(outcome: Mapping[str, Any], name: str, command: str, folder: Path) -> Path:
    """Add the numbers of an outcome to a file of records, in place of those of the same command on this machine.

    Args:
        outcome: what `common.setting` returns, and numbers and words in nested dictionaries; lists are left out.
        name: of the file, without its ending.
        command: that measured it.
        folder: of the file.
    """
    path = folder / f"{name}.jsonl"
    measured = {key: outcome[key] for key in _MEASURED if key in outcome}
    machine = dict(outcome["machine"])
    run = {"machine": machine, "commit": commit(), "date": _now(), "command": command}
    kept = [record for record in read(path) if _run_of(record) != _run_of(run)] if path.exists() else []
    added = [
        {**measured, "row": row, "key": key, "value": value, "unit": _unit(key), **run}
        for row, key, value in values({key: part for key, part in outcome.items() if key != "machine"})
        if row
    ]
    with atomic_write(path) as scratch:
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept + added), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def values(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, float | str]]:
    """Yield row, key and value of every finite number and word in nested dictionaries; the outermost row is ""."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from values(value, path if name in _GROUPS else (*path, name))
        elif (isinstance(value, str) and value) or _is_number(value):
            yield "/".join(path), name, value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def commit() -> str:
    """Return the commit of the checkout, and whether files of it have changed; "unknown" outside of one."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        # Records themselves, and documents filled from them, change between two measurements.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "kernels", "pyproject.toml")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with changes" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _run_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["command"], *(record["machine"].get(key) for key in _MACHINE)


def _unit(key: str) -> str:
    return next((unit for end, unit in _UNITS.items() if key.endswith(end)), "")
