"""Prompts in six groups, like those of Spec-Bench, written for this project.

A group has 34 prompts or more: a few written out, then every template with every subject. :func:`prompts` takes the
first ones, :func:`mixed` one of each group in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

STORY = (
    "The old lighthouse stood on the cliff above the village. Every evening the keeper climbed the stairs and lit the "
    "lamp. The keeper knew every ship by its sails. One night a storm came, and the keeper saw a small boat far out."
)
MEMO = (
    "The harbour froze in January, and ships waited for weeks. The mayor sent sledges with bread and lamp oil over the "
    "ice, and the sailors paid with coffee. When the ice broke in March, nobody in the town wanted to see coffee again."
)
NOTE = (
    "The library opens at nine on weekdays and at ten on Saturdays. Members borrow up to six books for four weeks, and "
    "may renew them twice. Late books cost ten cents a day. On Mondays a volunteer reads to children in the small hall."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
"""
FIRST = {  # by group
    "chat": (
        "Explain in a few sentences why the sky is blue.",
        "Give me a short recipe for pancakes.",
        "What should I see on a first visit to Rome?",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number.",
        "Write a Python class for a stack with push, pop and peek.",
    ),
    "edit": (
        f"Repeat this text and change every 'keeper' to 'guard':\n{STORY}",
        f"Repeat this code and rename `total` to `amount`:\n{CODE}",
    ),
}
_TEMPLATES = {
    "chat": (
        "Explain {} to a child.", "Give three facts about {}.", "Write a short story about {}.",
    ),
    "code": (
        "Write a Python function that {}.", "Write a JavaScript function that {}.",
        "Write a test for a function that {}.",
    ),
    "edit": (
        "Repeat this text in capital letters:\n{}", "Correct the spelling and repeat the text:\n{}",
        "Repeat this with a title in front:\n{}",
    ),
    "translate": (
        "Translate to French: {}", "Translate to German: {}", "Translate to Spanish: {}",
    ),
    "summarize": (
        "Summarize in one sentence: {}", "Summarize in three points: {}", "What is the main idea of this text? {}",
    ),
    "math": (
        "{} Show the steps.", "{} Explain your answer.", "Solve and check the result: {}",
    ),
}  # fmt: skip
_SUBJECTS = {
    "chat": (
        "the moon", "bread", "a lost key", "trains", "the sea", "an old oak", "winter", "honest work", "maps",
        "bees", "a bicycle", "the heart",
    ),
    "code": (
        "reverses a string", "finds the largest number in a list", "counts the words of a text",
        "checks for a palindrome", "merges two sorted lists", "removes duplicates",
        "converts Celsius to Fahrenheit", "computes a factorial", "tells whether a year is a leap year",
        "sorts names by length", "sums the digits of a number",
    ),
    "edit": (STORY, MEMO, NOTE, CODE, STACK, *(f"{a} {b}" for a, b in itertools.permutations((STORY, MEMO, NOTE), 2))),
    "translate": (
        "The cat sleeps on the warm stone wall.", "The train leaves at noon.", "My sister bakes bread on Sundays.",
        "Where is the nearest pharmacy?", "We walked along the river until dark.", "The shop is closed on Mondays.",
        "He lost his keys in the snow.", "Please close the window, it is cold.", "The children play in the garden.",
        "I would like a room with a view of the sea.", "Tomorrow it will rain in the north.",
        "The old bridge is safe.",
    ),
    "summarize": (
        STORY, MEMO, NOTE, *(f"{a} {b}" for a, b in itertools.permutations((STORY, MEMO, NOTE), 2)),
        *(" ".join(texts) for texts in itertools.permutations((STORY, MEMO, NOTE))),
    ),
    "math": (
        "What is 17 times 23?", "What is 12 plus 30 times 2?",
        "A train travels 60 km in 45 minutes. How fast is it?", "Three pens cost 4.50. What do seven cost?",
        "What is 15 percent of 240?", "A square has an area of 49. How long is a side?",
        "If x + 7 = 19, what is x?", "What is the sum of the numbers from 1 to 20?",
        "A shirt of 40 costs 25 percent less. What is its price?", "How many minutes are in a week?",
        "What is the average of 4, 8, 15 and 21?", "A tank fills in 3 hours. How full is it after 40 minutes?",
    ),
}  # fmt: skip
GROUPS = tuple(_TEMPLATES)


def prompts(group: str, count: int) -> list[str]:
    """Return the first prompts of a group.

    Raises:
        ValueError: it has fewer.
    """
    made = [t.format(subject) for subject, t in itertools.product(_SUBJECTS[group], _TEMPLATES[group])]
    every = [*FIRST.get(group, ()), *made]
    if count > len(every):
        raise ValueError(f"group {group!r} has {len(every)} prompts, fewer than {count}")
    return every[:count]


def mixed() -> Iterator[str]:
    """Yield prompts of the groups in turn, as many of each as the smallest has."""
    shortest = min(len(FIRST.get(g, ())) + len(_SUBJECTS[g]) * len(_TEMPLATES[g]) for g in GROUPS)
    for row in zip(*(prompts(group, shortest) for group in GROUPS), strict=True):
        yield from row
