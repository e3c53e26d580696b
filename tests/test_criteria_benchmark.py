"""The benchmark of exit criteria on a tiny model: its rules, its two lines for comparison, and its frontiers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import criteria
from river_compile.criteria import CRITERIA
from tests.families import make, prompt

LAYERS, CONTEXT, TOKENS = 4, 3, 4


@pytest.fixture(scope="module")
def rows():
    samples = [prompt(CONTEXT + TOKENS, seed=seed) for seed in range(3)]
    base = {"lowering": "eager", "group_size": 32, "quantizer": "rtn"}
    with torch.inference_mode():
        return criteria.measure(make("llama", layers=LAYERS), samples, CONTEXT, False, base)


def of(rows, name):
    return [row for row in rows if row["criterion"] == name]


def test_when_all_tokens_leave_at_once_it_does_not_matter_why(rows):
    first_exit = criteria.FIRST_EXIT
    all_left = [r for r in rows if (r["left"], r["depth"], r["first_exit"]) == (1.0, first_exit, first_exit)]
    assert {row["criterion"] for row in all_left} == {*CRITERIA, "chance", "oracle"}
    assert all(row["kl"] == pytest.approx(all_left[0]["kl"], rel=1e-4) for row in all_left)
    assert all_left[0]["kl"] > 1e-5


def test_a_token_stays_or_leaves_and_only_doubt_pays_for_both(rows):
    for row in rows:
        assert 0 <= row["left"] <= 1
        assert row["time"] > 0
        assert row["doubted"] == (pytest.approx(1 - row["left"]) if row["criterion"] == "doubt" else 0)


def test_an_oracle_loses_less_than_chance(rows):
    for chance, oracle in zip(of(rows, "chance"), of(rows, "oracle"), strict=True):
        assert oracle["kl"] <= chance["kl"] + 1e-6
    assert of(rows, "oracle")[0]["kl"] < of(rows, "chance")[0]["kl"]


def test_frontiers_mix_rules_and_never_exit(rows, tmp_path, capsys):
    assert criteria.least_kl([(0.5, 0.2), (1.0, 0.0)], 0.75) == pytest.approx(0.1)
    assert criteria.least_kl([(0.8, 0.1)], 0.7) is None
    criteria.show("tiny", rows)
    assert "KL at equal time" in capsys.readouterr().out
    assert 1_000 < criteria.plot({"tiny": rows}, tmp_path).stat().st_size < 120_000
