"""What a test does by default and what with --slow: how many random examples it takes, and which of its parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from hypothesis import Phase, settings

SHARES = {"quick": 0.3, "slow": 1.0, "long": 200.0}  # by the name of a profile of Hypothesis
_DEFAULT = 100  # of a test that names no number
_LEAST = 3


def register_profiles(shrink: bool = False) -> None:
    """Registers the profiles, of which "quick" counts from now on; all but "long" draw the same examples each time.

    A property that fails prints the case that it failed for, or with `shrink` the smallest one, which takes long.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    for name, share in SHARES.items():
        repeats = {"derandomize": True} if name != "long" else {}
        most = round(share * _DEFAULT)
        settings.register_profile(name, max_examples=most, deadline=None, database=None, phases=phases, **repeats)
    settings.load_profile("quick")


def examples(count: int) -> settings:
    """Returns settings for so many examples with --slow, and for the profile's share of them otherwise.

    "long" asks every test for 20,000.
    """
    most = settings.default.max_examples
    return settings(max_examples=most if most > _DEFAULT else max(_LEAST, count * most // _DEFAULT))


def slow(*values: object) -> object:
    """Returns a parameter of a test, or a tuple of them, that counts with --slow alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(quick: Collection, parameters: Iterable) -> list:
    """Returns parameters of a test, or tuples of them, of which all but the `quick` ones count with --slow alone."""
    tuples = [(value, value if isinstance(value, tuple) else (value,)) for value in parameters]
    return [value if value in quick else slow(*values) for value, values in tuples]
