"""Arithmetic and word problems from reasoning-gym's seeded generators, and its grading of answers.

Task "gsm" is word problems alone, made like those of GSM8K. Not handled: what other collections of problems measure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SMALL = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
_GENERATORS: dict[str, dict[str, int]] = {"chain_sum": _SMALL, "basic_arithmetic": _SMALL, "gsm_symbolic": {}}
TASKS = {"reasoning": tuple(_GENERATORS), "gsm": ("gsm_symbolic",)}
_ASK = "Think step by step and end with the number."


@dataclass(frozen=True)
class Problem:
    """A question, and the generator and entry that it came from."""

    question: str
    source: Any
    entry: dict[str, Any]


def problems(count: int, seed: int = 0, generators: Sequence[str] = TASKS["reasoning"]) -> list[Problem]:
    """Return so many problems, each generator's in turn, always the same for one seed."""
    from reasoning_gym import create_dataset

    each = -(-count // len(generators))
    sources = [create_dataset(name, size=each, seed=seed, **_GENERATORS[name]) for name in generators]
    made = [Problem(f"{source[i]['question']} {_ASK}", source, source[i]) for i in range(each) for source in sources]
    return made[:count]


def solved(problem: Problem, text: str) -> bool:
    """Return whether the last number of an answer is the right one."""
    numbers: Sequence[str] = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return bool(numbers) and problem.source.score_answer(numbers[-1].replace(",", ""), problem.entry) == 1
