"""What a setting may be: one wording of every refusal, for options of the backend, of exact mode and of kernels.

    first_exit=0 is not allowed; it must be an integer of 1 or more
    quantizer='hqqq' is not allowed; choose one of 'hqq', 'rtn', 'gptq', 'awq' (did you mean 'hqq'?)

Not handled: settings that depend on each other. Importing this imports neither torch nor numpy.
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
    """A check of one value, called with the setting's name.

    `wanted` ends its message, such as "it must be True or False"; `fits` says whether a plain value is allowed;
    `choices` are the allowed values where they are few, for the closest match.
    """

    wanted: str
    fits: Callable[[Any], bool]
    choices: tuple[object, ...] = ()

    def __call__(self, name: str, value: object, error: type[ValueError] = ValueError) -> Any:
        """Returns the value as plain Python: numbers of numpy and torch as Python's, lists and arrays as tuples.

        Raises:
            ValueError: (of the class `error`) it is not allowed.
        """
        plain = _plain(value)
        if not self.fits(plain):
            raise error(f"{name}={shown(value)} is not allowed; {self.wanted}{closest(value, self.choices)}")
        return plain


def _plain(value: object) -> object:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def shown(value: object) -> str:
    """Returns a value as messages show it: its repr, of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def closest(value: object, choices: Iterable[object]) -> str:
    """Returns the end of a message that names the choice most like `value`, empty if none is."""
    match = difflib.get_close_matches(str(value), [c for c in choices if isinstance(c, str)], n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_of(*choices: object) -> Check:
    """Allows what equals one of these and has its type: 1 is not True."""

    def fits(value: object) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in choices)

    return Check(f"choose one of {', '.join(map(repr, choices))}", fits, choices)


def integer(least: int, wanted: str = "") -> Check:
    """Allows integers of `least` or more."""
    wanted = wanted or f"it must be an integer of {least} or more"
    return Check(wanted, lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least)


def number(wanted: str, least: float = -math.inf) -> Check:
    """Allows integers and floats of `least` or more, and never NaN."""

    def fits(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least

    return Check(wanted, fits)


def optional(check: Check) -> Check:
    """Allows None too."""
    wanted = check.wanted.replace("it must be ", "it must be None or ")
    return Check(wanted, lambda value: value is None or check.fits(value), check.choices)


FLAG = Check("it must be True or False", lambda value: isinstance(value, bool))
PATH = Check(
    "it must be a path",
    lambda value: isinstance(value, (str, os.PathLike)) and str(value) != "" and "\0" not in str(value),
)
_POSITIVE = integer(1)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        one_of(*choices)(name, value)


def check_positive(**values: object) -> None:
    """Raises a ValueError for a value that is not an integer of 1 or more."""
    for name, value in values.items():
        _POSITIVE(name, value)
