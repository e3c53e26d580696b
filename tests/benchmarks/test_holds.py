"""Rates of drafted tokens and what they are worth, by hand-made cycles and passes."""

import pytest

from benchmarks.holds import best, judge, tokens_per_cycle
from river_compile.runtime.stats import CycleRecord


def cycle(drafted: tuple[str, ...], kept: tuple[str, ...]) -> CycleRecord:
    return CycleRecord(drafted, kept, 4, (0.1, 0.2, 0.0), 0, 0)


def test_a_token_is_judged_where_all_before_it_held():
    """The first that does not hold is the last one judged; of a text that ended, only what was kept is."""
    river = ("river",) * 3
    held_one = cycle(river, ("river", "backbone"))
    held_all = cycle((*river[:2], "lookup"), ("river", "river", "lookup", "backbone"))
    ended = cycle(river, ("river", "river"))
    found = judge([held_one, held_all, ended])
    assert (found["river"].judged, found["river"].held) == ([3, 3], [3, 2])
    assert (found["lookup"].judged, found["lookup"].rates) == ([0, 0, 1], [0.0, 0.0, 1.0])


def test_the_best_length_is_where_another_draft_costs_more_than_it_brings():
    rates = [0.9, 0.8, 0.1]
    seconds = {"draft": 0.25, "1": 1.0, "2": 1.0, "4": 1.5}
    assert tokens_per_cycle(rates, 2) == pytest.approx(1 + 0.9 + 0.72)
    assert best(rates, seconds) == (1, pytest.approx(1.9 / 1.25))
    assert best(rates, seconds | {"4": 1.0}) == (2, pytest.approx(2.62 / 1.5))
    assert best([0.1], seconds) == (0, 1.0)
