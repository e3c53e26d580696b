"""`quality="fast"` without a rule: full depth until one within the budget is found, which is kept with the twins."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import river_compile
from river_compile.errors import OptionError
from river_compile.record import find_record
from river_compile.twins import exit_tuning, making, pack
from river_compile.twins.pack import TwinWeights
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS

OPTIONS = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"}
LAYERS = 2


def fast(**options):
    options = {**OPTIONS, "compile_cache": False, **options}
    return river_compile.accelerate(make("llama", layers=LAYERS), "fast", **options)


def depths(model, tokens=8):
    ids = prompt()
    with river_compile.trace() as seen:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
    return [step.depth for step in seen.tokens]


def rule_of(model):
    return river_compile.report(model).to_dict()["exit_rule"]


def test_a_budget_above_the_loss_lets_every_token_exit():
    model = fast(budget=10.0)
    assert set(depths(model)) == {0}
    rule = rule_of(model)
    assert (rule["share"], rule["threshold"], rule["refusal"]) == (1, None, None)
    assert rule["kl"] == rule["kl_of_all"] > 0
    assert "exit rule      tokens exit before the first layer, each" in str(river_compile.report(model))


def test_a_budget_that_no_exit_keeps_gives_full_depth_and_the_report_says_so():
    model = fast(budget=1e-9)
    assert set(depths(model)) == {LAYERS}
    assert rule_of(model)["share"] == 0
    assert "exit rule      none keeps KL 1e-09 (all in 4 bits lose" in str(river_compile.report(model))


def test_between_them_the_surest_tokens_exit_within_the_budget():
    whole = fast(budget=10.0)
    depths(whole)
    budget = rule_of(whole)["kl_of_all"] / 2
    model = fast(budget=budget)
    depths(model)
    rule = rule_of(model)
    assert 0 < rule["share"] < 1
    assert 0 < rule["kl"] <= budget
    assert math.isfinite(rule["threshold"])


def test_full_depth_answers_until_the_rule_is_there(monkeypatch):
    release, make_weight = threading.Event(), making.make_weight

    def hold(matmul, *args):
        assert matmul.lossless or release.wait(60)
        return make_weight(matmul, *args)

    monkeypatch.setattr(making, "make_weight", hold)
    monkeypatch.setattr(pack, "_SMALL", 0)
    model = fast(budget=10.0)
    try:
        assert set(depths(model)) == {LAYERS}
        assert "none yet; it is tuned in the background" in str(river_compile.report(model))
    finally:
        release.set()
    find_record(model).of(TwinWeights).background.packing.wait()
    assert set(depths(model)) == {0}


def test_a_later_process_reads_the_rule_with_the_twins(tmp_path, monkeypatch):
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
    first = fast(budget=10.0, compile_cache=True)
    assert set(depths(first)) == {0}
    monkeypatch.setattr(exit_tuning, "tuned", lambda *_: pytest.fail("tuned again"))
    again = fast(budget=10.0, compile_cache=True)
    assert set(depths(again)) == {0}
    assert rule_of(again) == rule_of(first)


def test_a_model_that_cannot_be_measured_stays_at_full_depth_with_the_reason(monkeypatch):
    def fails(*_):
        raise RuntimeError("no text")

    monkeypatch.setattr(exit_tuning, "sample", fails)
    model = fast(budget=10.0)
    assert set(depths(model)) == {LAYERS}
    assert rule_of(model)["refusal"] == "RuntimeError: no text"
    assert "no token exits: RuntimeError: no text" in str(river_compile.report(model))


def test_changed_weights_are_tuned_anew():
    model = fast(budget=10.0)
    depths(model)
    before = rule_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.warns(river_compile.RiverWarning, match="weights changed"):
        assert set(depths(model)) == {0}
    assert rule_of(model)["kl_of_all"] != before["kl_of_all"]


def test_options_with_a_rule_are_not_tuned():
    for given in ({"threshold": 2.0}, {"exit_depth": LAYERS}):
        model = fast(**given)
        assert set(depths(model)) == {LAYERS}
        assert rule_of(model) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 is not allowed"),
        ({"budget": 0.1, "exit_depth": 1}, "budget=0.1 tunes the exit rule, which exit_depth=1 sets"),
        ({"budget": 0.1, "threshold": 0.3}, "budget=0.1 tunes the exit rule, which threshold=0.3 sets"),
        ({"budget": 0.1, "criterion": "similarity"}, "budget=0.1 tunes an entropy"),
        ({"budget": 0.1, "offload": 1}, "budget=0.1 compares with full depth"),
        ({"budget": 0.1, "calibration": "rule.json"}, "budget= tunes an exit rule, which calibration= sets"),
    ],
)
def test_a_budget_does_not_go_with_a_rule(options, message):
    with pytest.raises(OptionError, match=message):
        fast(**options)


def test_exact_mode_takes_no_budget():
    with pytest.raises(OptionError, match=r"budget=0.1 requires quality='fast'"):
        river_compile.accelerate(make("llama", layers=LAYERS), budget=0.1, **OPTIONS)
