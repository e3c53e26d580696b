"""Exact mode on paper: what a cycle keeps, and how long drafts are that pay."""

import pytest

from benchmarks.estimate import exact_cycle, exact_rows


class Paper:
    """A model whose passes take a given time."""

    def __init__(self, draft: float, verify: float) -> None:
        self._draft, self._verify = draft, verify

    def draft(self, head: str) -> float:
        return self._draft / (2 if head == "w4" else 1)

    def verification(self, positions: int, weights: str) -> float:
        return self._verify * (0.75 if weights == "bf12" else 1)


def test_a_cycle_keeps_what_held_and_the_backbones_own_token():
    row = exact_cycle(Paper(1e-3, 4e-3), 0.5, "dense", "dense", 3)
    assert row["tokens_per_cycle"] == 1.875
    assert row["seconds"] == pytest.approx(3 * (1e-3 + 5e-6) + 4e-3 + 5e-6 + 30e-6)
    assert row["tokens_per_s"] == pytest.approx(1.875 / row["seconds"])
    assert row["over_plain"] == pytest.approx(row["tokens_per_s"] * (4e-3 + 35e-6))


def test_drafts_are_as_long_as_they_pay():
    never, cheap, dear = (
        exact_rows(Paper(*times), [hold])[0]
        for times, hold in (((1e-3, 4e-3), 0.0), ((1e-4, 4e-3), 0.9), ((2e-3, 4e-3), 0.9))
    )
    assert (never["drafted"], never["over_plain"]) == (0, pytest.approx(1))
    assert 0 < dear["drafted"] < cheap["drafted"] <= 15
    rows = exact_rows(Paper(1e-3, 4e-3), [0.7, 0.9])
    assert [row["hold"] for row in rows] == [0.7] * 4 + [0.9] * 4
    assert rows[3]["tokens_per_s"] == max(row["tokens_per_s"] for row in rows[:4])  # 12 bits, and a small head
