"""Replays ways to draft over texts of which it is recorded, token by token, who would have drafted them right.

A draft is accepted up to its first wrong token, and before that every draft has the text as its context: the record of
each drafter alone says what any cycle gives. Not handled: copies from the context, lengths that follow the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

ASSISTANT_LENGTHS, TWINS_LENGTHS = range(1, 16), range(1, 16)  # tokens of a draft
CHECKED = range(1, 8)  # tokens of the assistant that the twins check together


@dataclass(frozen=True)
class Text:
    """By token of a text: whether a drafter's choice after the text so far is that token."""

    kind: str  # of its prompt
    assistant: Sequence[bool]
    twins: Sequence[bool]
    same: Sequence[bool]  # whether both have the same choice


@dataclass(frozen=True)
class Seconds:
    """What passes take. Passes of several tokens have some widths; a pass of others is padded to the next."""

    assistant: float  # a draft step
    twins: float
    target: Mapping[int, float]  # by width
    twins_passes: Mapping[int, float]


Cycle: TypeAlias = tuple[float, int]  # seconds, and tokens of the text that are there afterwards
Way: TypeAlias = Callable[[Text, int], Cycle]  # of a text from a place on


def undrafted(seconds: Seconds) -> Way:
    """Return the target alone."""
    return lambda text, place: (seconds.target[1], 1)


def by_twins(seconds: Seconds, length: int) -> Way:
    """Return drafts of `length` tokens of the twins."""
    took = length * seconds.twins + _padded(seconds.target, length + 1)
    return lambda text, place: (took, 1 + _agreed(text.twins, place, length))


def by_assistant(seconds: Seconds, length: int) -> Way:
    """Return drafts of `length` tokens of the assistant."""
    verifying = _padded(seconds.target, length + 1)

    def cycle(text: Text, place: int) -> Cycle:
        agreed = _agreed(text.assistant, place, length)
        return _steps(seconds, length, agreed) + verifying, 1 + agreed

    return cycle


def two_levels(seconds: Seconds, length: int, checked: int) -> Way:
    """Return drafts of `length` tokens or a few more: of the assistant, `checked` for each pass of the twins."""

    # So the draft is the twins' own text. Where that has left the target's, both drafters are taken to agree as often
    # as they do on the target's.
    def cycle(text: Text, place: int) -> Cycle:
        drafted, took = 0, 0.0
        while drafted < length:
            agreed = _agreed(text.same, place + drafted, checked)
            took += _steps(seconds, checked, agreed) + _padded(seconds.twins_passes, checked + 1)
            drafted += agreed + 1
        return took + _padded(seconds.target, drafted + 1), 1 + _agreed(text.twins, place, drafted)

    return cycle


def speed(texts: Iterable[Text], *ways: Way) -> float:
    """Return the tokens/s of texts; of several ways each cycle has the one that makes the whole text fastest."""
    tokens, took = 0, 0.0
    for text in texts:
        least = [0.0]  # seconds from a place to the end, the last place first
        for place in reversed(range(len(text.twins))):
            cycles = (way(text, place) for way in ways)
            least.append(min(s + least[max(len(least) - emitted, 0)] for s, emitted in cycles))
        tokens, took = tokens + len(text.twins), took + least[-1]
    return tokens / took


def best(texts: Sequence[Text], seconds: Seconds) -> dict[str, tuple[str, tuple[Way, ...]]]:
    """Return each way to draft with its constant lengths that are best for all texts: the lengths in words, the way."""
    widest = max(seconds.target)
    by_one = {
        "twins": {f"{n}": (by_twins(seconds, n),) for n in TWINS_LENGTHS if n < widest},
        "assistant": {f"{n}": (by_assistant(seconds, n),) for n in ASSISTANT_LENGTHS if n < widest},
    }
    pairs = itertools.product(by_one["assistant"].items(), by_one["twins"].items())
    checked = [
        (n, m) for n, m in itertools.product(TWINS_LENGTHS, CHECKED) if n + m < widest and m < max(seconds.twins_passes)
    ]
    ways: dict[str, dict[str, tuple[Way, ...]]] = {
        "no drafts": {"": (undrafted(seconds),)},
        **by_one,
        "best of both in each cycle": {f"{m}, {n}": (*one, *other) for (m, one), (n, other) in pairs},
        "two levels": {f"{n}+ by {m}": (two_levels(seconds, n, m),) for n, m in checked},
    }
    found = {}
    for name, by_length in ways.items():
        lengths = max(by_length, key=lambda length: speed(texts, *by_length[length]))
        found[name] = lengths, by_length[lengths]
    return found


def _agreed(flags: Sequence[bool], place: int, most: int) -> int:
    """Return how many flags in a row are set from a place on, behind the end as many as may be."""
    return next((n for n, flag in enumerate(flags[place : place + most]) if not flag), most)


def _steps(seconds: Seconds, length: int, agreed: int) -> float:
    """Return the seconds of an assistant's steps, with the one that takes in its last token if all were accepted."""
    return (length + (agreed == length)) * seconds.assistant


def _padded(by_width: Mapping[int, float], width: int) -> float:
    return by_width[min(w for w in by_width if w >= width)]
