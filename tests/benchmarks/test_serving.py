"""`benchmarks.serving`: when clients come, and what is made of the answers."""

import itertools
import statistics

import pytest

from benchmarks.serving import Answer, arrivals, summary


def test_clients_come_at_random_from_a_seed():
    """The first immediately, the others after gaps whose mean is what the rate says."""
    times = arrivals(2000, rate=4.0, seed=1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times == arrivals(2000, 4.0, 1) != arrivals(2000, 4.0, 2)
    assert times[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)


def test_the_rate_counts_all_tokens_from_the_first_question_to_the_last_answer():
    found = summary([Answer(10.0, 10.5, 12.0, 30), Answer(11.0, 14.0, 15.0, 20)])
    assert found["tokens_per_s"] == 10.0
    assert found["tokens"] == 50
    assert found["first_token_s"] == 1.75
    assert found["first_token_p95_s"] == 3.0
