"""Random cases: drawn from a seed, run, made smaller where they fail, and kept so that they can be run again.

A kind of case is a module with `draw(rng)`, `run(case, folder)`, which returns what became of it ("passed", "refused")
or raises, and `smaller(case)`, which yields simpler cases. A case is plain data (JSON), so the file of a failure is its
reproduction, but for the timing of threads. A case that ends the process stays in the folder as "running.json".
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Case = dict[str, Any]
PRODUCT = ("river_compile", "passes", "kernels")
_SHRINKING = 120.0  # seconds for making one failure smaller


class Failure(AssertionError):
    """The product did what it must not do; the message says what."""


class Kind(Protocol):
    def draw(self, rng: random.Random) -> Case: ...

    def run(self, case: Case, folder: Path) -> str: ...

    def smaller(self, case: Case) -> Iterator[Case]: ...


@dataclass
class Tally:
    """What became of the cases: counts of outcomes by kind, and the files of the failures."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Path] = field(default_factory=list)

    def add(self, kind: str, outcome: str) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def __str__(self) -> str:
        lines = []
        for kind, counts in self.outcomes.items():
            parts = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
            lines.append(f"{kind:8} {counts.total():6} cases: {parts}")
        return "\n".join(lines)


def refused_by_us(error: Exception) -> bool:
    """Whether an error is a ValueError that this package raised itself: a refusal with a name."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parents[2]
    ours = frames and any(Path(frames[-1].filename).is_relative_to(root / part) for part in PRODUCT)
    return isinstance(error, ValueError) and bool(ours)


def attempt(kind: Kind, case: Case) -> tuple[str, str]:
    """Run a case in its own folder; return its outcome and the traceback of its failure, empty without one."""
    with tempfile.TemporaryDirectory(prefix="river-soak-") as folder:
        try:
            return kind.run(case, Path(folder)), ""
        except Exception as error:  # (whatever it is, it is the finding)
            return f"FAILED ({type(error).__name__})", traceback.format_exc()


def shrunk(kind: Kind, case: Case, outcome: str, seconds: float = _SHRINKING) -> Case:
    """Return a simpler case with the same failure, as far as the time suffices."""
    end = time.monotonic() + seconds
    while True:
        for simpler in kind.smaller(case):
            if time.monotonic() > end:
                return case
            if attempt(kind, simpler)[0] == outcome:
                case = simpler
                break
        else:
            return case


def soak(kinds: Mapping[str, tuple[Kind, float]], seed: int, seconds: float, failures: Path) -> Tally:
    """Run random cases until the time is over; failures with their tracebacks, and the tally, go to a folder.

    Args:
        kinds: by name, each with the share of the time that is its own.
        seed: case i of a kind is drawn from "seed/kind/i".
        seconds: no case starts after them.
        failures: the folder.
    """
    failures.mkdir(parents=True, exist_ok=True)
    tally, spent = Tally(), dict.fromkeys(kinds, 0.0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = min(kinds, key=lambda name: spent[name] / kinds[name][1])
        kind = kinds[name][0]
        number = tally.outcomes.get(name, Counter()).total()
        case = {"kind": name, **kind.draw(random.Random(f"{seed}/{name}/{number}"))}
        running = failures / "running.json"
        running.write_text(json.dumps(case, indent=1), encoding="utf-8")
        start = time.monotonic()
        outcome, said = attempt(kind, case)
        if said:
            case = shrunk(kind, case, outcome)
            path = failures / f"{name}-{seed}-{number}.json"
            path.write_text(json.dumps(case, indent=1), encoding="utf-8")
            path.with_suffix(".txt").write_text(said, encoding="utf-8")
            tally.failures.append(path)
            print(
                f"{name} case {number}: {said.strip().splitlines()[-1]}\n  python -m tools.soak --again {path}",
                flush=True,
            )
        tally.add(name, outcome)
        spent[name] += time.monotonic() - start
        running.unlink()
        (failures / "tally.txt").write_text(f"seed {seed}\n{tally}\n", encoding="utf-8")  # (if it ends before its time)
    return tally
