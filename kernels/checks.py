"""Checks of option values, with one wording for every error.

    first_exit=0 is not allowed; it must be an integer of 1 or more
    quantizer='hqqq' is not allowed; choose one of 'hqq', 'rtn', 'gptq', 'awq' (did you mean 'hqq'?)
Not handled: options that depend on each other. Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_LONGEST = 100  # characters of a value in a message


@dataclass(frozen=True)
class Check:
    """A check of one value, called with the option's name."""

    requirement: str  # ends the message: "it must be True or False"
    allows: Callable[[Any], bool]  # of a plain Python value
    choices: tuple[object, ...] = ()  # the allowed values if they are few, for the closest match

    def __call__(self, name: str, value: object, error: type[ValueError] = ValueError) -> Any:
        """Return the value as plain Python (lists and arrays as tuples); raise `error` if it is not allowed."""
        plain = _plain(value)
        if not self.allows(plain):
            hint = did_you_mean(value, self.choices)
            raise error(f"{name}={short_repr(value)} is not allowed; {self.requirement}{hint}")
        return plain


def _plain(value: object) -> object:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def short_repr(value: object) -> str:
    text = repr(value)
    if "\n" in text:  # a module's has a line for each part
        return type(value).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Return the end of a message that names the closest choice, empty if none is close."""
    match = difflib.get_close_matches(str(value), [c for c in choices if isinstance(c, str)], n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_of(*choices: object) -> Check:
    """Allow values that equal a choice and have its type: 1 is not True."""

    def allows(value: object) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in choices)

    return Check(f"choose one of {', '.join(map(repr, choices))}", allows, choices)


def integer(least: int, requirement: str = "", most: float = math.inf) -> Check:
    size = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
    requirement = requirement or f"it must be an integer {size}"

    def allows(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Check(requirement, allows)


def number(requirement: str, least: float = -math.inf, most: float = math.inf) -> Check:
    """Allow integers and floats from `least` to `most`, never NaN."""

    def allows(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    return Check(requirement, allows)


def optional(check: Check) -> Check:
    """Allow None too."""
    requirement = check.requirement.replace("it must be ", "it must be None or ")
    return Check(requirement, lambda value: value is None or check.allows(value), check.choices)


FLAG = Check("it must be True or False", lambda value: isinstance(value, bool))
PATH = Check(
    "it must be a path",
    lambda value: isinstance(value, (str, os.PathLike)) and str(value) != "" and "\0" not in str(value),
)
_POSITIVE = integer(1)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        one_of(*choices)(name, value)


def check_positive(**values: object) -> None:
    """Raise a ValueError for a value that is not an integer of 1 or more."""
    for name, value in values.items():
        _POSITIVE(name, value)
