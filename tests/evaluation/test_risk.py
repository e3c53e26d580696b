"""The promise of calibration holds: over many draws of texts it is broken no more often than its confidence says."""

from __future__ import annotations

import math
import random

import pytest

from river_compile.evaluation.risk import fixed_sequence, p_value, texts_needed

BUDGET = 0.2
CONFIDENCE = 0.9
DRAWS = 1500
MEANS = (0.08, 0.12, 0.16, 0.21, 0.26, 0.34)  # of candidates, safest first: the last three break the budget

SOURCES = {
    "zero or one": lambda rng, mean: float(rng.random() < mean),
    "small spread": lambda rng, mean: mean * (0.5 + rng.random()),
    "rare and large": lambda rng, mean: 1.0 if rng.random() < mean - 0.02 else 0.02 / (1.02 - mean),
}


def sample(source, mean, texts, rng):
    return [SOURCES[source](rng, mean) for _ in range(texts)]


def violations(choose, source, texts=80):
    """Returns the share of draws in which the candidate chosen last breaks the budget, and the mean number passed."""
    rng = random.Random(5)
    passed = [choose([sample(source, mean, texts, rng) for mean in MEANS]) for _ in range(DRAWS)]
    broken = sum(count > 0 and MEANS[count - 1] > BUDGET for count in passed)
    return broken / DRAWS, sum(passed) / DRAWS


@pytest.mark.parametrize("source", SOURCES)
def test_the_budget_is_broken_no_more_often_than_promised(source):
    """Within three standard errors of 1 - confidence, whatever the distribution; and something does pass."""
    rate, passed = violations(lambda losses: fixed_sequence(losses, BUDGET, CONFIDENCE), source)
    allowed = 1 - CONFIDENCE
    assert rate <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / DRAWS)
    assert passed > 0.5


def test_the_test_above_can_fail():
    """Taking the measured mean at its word breaks the budget several times as often as promised."""

    def naive(losses):
        return max((i + 1 for i, sample in enumerate(losses) if sum(sample) / len(sample) <= BUDGET), default=0)

    rate, _ = violations(naive, "zero or one")
    assert rate > 3 * (1 - CONFIDENCE)


@pytest.mark.parametrize("source", SOURCES)
def test_p_values_are_small_no_more_often_than_their_size(source):
    rng = random.Random(3)
    values = [p_value(sample(source, BUDGET, 30, rng), BUDGET) for _ in range(DRAWS)]
    for level in (0.05, 0.1, 0.3):
        share = sum(value <= level for value in values) / DRAWS
        assert share <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


def test_more_texts_and_less_loss_are_better_evidence():
    assert p_value([0.1] * 80, BUDGET) < p_value([0.1] * 40, BUDGET) < p_value([0.15] * 40, BUDGET)
    assert p_value([0.3] * 40, BUDGET) == 1
    assert p_value([], BUDGET) == 1


def test_how_many_texts_it_takes():
    """One text fewer does not pass, even without any loss."""
    needed = texts_needed(0.05, CONFIDENCE)
    assert p_value([0.0] * needed, 0.05) <= 0.1 < p_value([0.0] * (needed - 1), 0.05)


def test_candidates_behind_a_failure_are_not_even_drawn():
    drawn = []

    def losses():
        for mean in (0.0, 1.0, 0.0):
            drawn.append(mean)
            yield [mean] * 50

    assert fixed_sequence(losses(), BUDGET, CONFIDENCE) == 1
    assert drawn == [0.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "budget", "message"),
    [([1.5], 0.1, "loss of 1.5 lies outside"), ([-0.1], 0.1, "outside"), ([0.0], 1.0, r"budget=1.0 is not allowed")],
)
def test_bad_numbers_are_refused(losses, budget, message):
    with pytest.raises(ValueError, match=message):
        p_value(losses, budget)
