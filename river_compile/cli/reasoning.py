"""Word problems with one whole number as the answer, made from a seed, so that nothing is downloaded.

Not handled: anything that a real collection of problems measures; these only show whether a way of running a model
answers as the plain model does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TEMPLATES: tuple[tuple[str, Callable[[int, int, int], int]], ...] = (
    ("A box holds {a} pens. How many pens are in {b} boxes?", lambda a, b, c: a * b),
    ("Ann has {a} apples and buys {b} more, then gives {c} away. How many has she?", lambda a, b, c: a + b - c),
    ("A shelf has {b} rows of {a} books, and {c} books are taken. How many are left?", lambda a, b, c: a * b - c),
    ("A ticket costs {a} coins. What do {b} tickets cost with a fee of {c} coins?", lambda a, b, c: a * b + c),
    ("Tom runs {a} km each day. How far does he run in {b} days?", lambda a, b, c: a * b),
)
_ASK = "Think step by step and end with the number."


@dataclass(frozen=True)
class Problem:
    """A question, and the number that answers it."""

    question: str
    answer: int


def problems(count: int, seed: int = 0) -> list[Problem]:
    """Returns so many problems, always the same for one seed."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        text, solve = _TEMPLATES[i % len(_TEMPLATES)]
        a, b, c = draw.randint(2, 12), draw.randint(2, 12), draw.randint(1, 4)
        made.append(Problem(f"{text.format(a=a, b=b, c=c)} {_ASK}", solve(a, b, c)))
    return made


def solved(problem: Problem, text: str) -> bool:
    """Returns whether the last number of an answer is the right one."""
    numbers: Sequence[str] = re.findall(r"-?\d[\d,]*", text)
    return bool(numbers) and int(numbers[-1].replace(",", "")) == problem.answer
