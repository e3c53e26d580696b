"""The benchmark of exit criteria on a tiny model: its rules, its two lines for comparison, and its frontiers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import criteria
from river_compile.evaluation.meter import Measured
from river_compile.exits import CRITERIA
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS

LAYERS, CONTEXT, TOKENS = 3, 3, 4
NAMES = ("similarity", "confidence")


@pytest.fixture(scope="module")
def rows():
    samples = [prompt(CONTEXT + TOKENS, seed=seed) for seed in range(2)]
    base = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"}
    with torch.inference_mode():
        return criteria.measure(make("llama", layers=LAYERS), samples, CONTEXT, False, base)


def of(rows, name):
    return [row for row in rows if row["criterion"] == name]


@pytest.mark.slow
def test_when_all_tokens_leave_at_once_it_does_not_matter_why(rows):
    first_exit = criteria.FIRST_EXIT
    all_left = [r for r in rows if (r["left"], r["depth"], r["first_exit"]) == (1.0, first_exit, first_exit)]
    assert {row["criterion"] for row in all_left} == {*NAMES, "chance", "oracle"}
    assert all(row["kl"] == pytest.approx(all_left[0]["kl"], rel=1e-4) for row in all_left)
    assert all_left[0]["kl"] > 1e-5


@pytest.mark.slow
def test_each_threshold_lets_its_share_of_the_tokens_leave(rows):
    """Or more of them, which leave after a later block."""
    for name in NAMES:
        mine = of(rows, name)[: len(criteria.SHARES)]
        left = [row["left"] for row in mine]
        assert left == sorted(left)
        assert all(got >= share - 1 / (2 * TOKENS) for got, share in zip(left, criteria.SHARES, strict=True))


class Scripted:
    """A meter of four tokens whose losses are known; keeps the depths that it is asked to measure."""

    num_blocks = 9

    def __init__(self) -> None:
        self.depths = {"chance": [], "oracle": []}

    def measure(self, rule, texts, title):
        return Measured(rule, [[0.1, 0.5], [0.3, 0.2]], [], [])

    def measure_at(self, depths, texts, title):
        self.depths[title].append(depths)
        return None


def test_an_oracle_lets_those_leave_that_lose_least_and_chance_as_many(monkeypatch):
    monkeypatch.setattr(criteria, "SHARES", (0.25, 0.5, 0.75))
    meter = Scripted()
    found = criteria._reference_lines(meter, CRITERIA["confidence"], range(2))
    assert [name for name, _ in found] == ["chance"] * 4 + ["oracle"] * 4
    assert meter.depths["oracle"] == [[[2, 9], [9, 9]], [[2, 9], [9, 2]], [[2, 9], [2, 2]]]
    assert [sum(text.count(2) for text in depths) for depths in meter.depths["chance"]] == [1, 2, 3]


def test_frontiers_mix_rules_and_never_exit(rows, capsys):
    assert criteria.least_kl([(0.5, 0.2), (1.0, 0.0)], 0.75) == pytest.approx(0.1)
    assert criteria.least_kl([(0.8, 0.1)], 0.7) is None
    criteria.show("tiny", rows)
    _, frontiers = capsys.readouterr().out.split("KL at equal time")
    assert [line.split()[0] for line in frontiers.splitlines()[-4:]] == list(criteria.at_equal_time(rows))
