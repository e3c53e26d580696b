"""ExitRule measures what its options then do, takes the cheapest rule that passed, and says what it cannot keep."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import pytest
import torch
from transformers import StaticCache

from river_compile import ExitRule, trace, tune_exit
from river_compile.backend import river
from river_compile.errors import BudgetError, OptionError
from river_compile.evaluation.meter import Meter
from river_compile.exits import CRITERIA
from tests.support.commands import compile_by_operator
from tests.support.decoding import cache_argument
from tests.support.families import make, prompt

CONTEXT, TOKENS = 4, 4
OPTIONS = {"group_size": 32, "quantizer": "rtn"}
MANY = [" ".join(map(str, prompt(CONTEXT + TOKENS, seed=seed)[0].tolist())) for seed in range(200)]
TEXTS = MANY[:40]


def tokenizer(text):
    return {"input_ids": [int(word) for word in text.split()]}


def run(model, budget, texts=TEXTS, **arguments):
    torch._dynamo.reset()
    arguments = {"options": OPTIONS, "context": CONTEXT, "tokens": TOKENS, "progress": False, **arguments}
    return tune_exit(model, tokenizer, texts, budget, **arguments)


@pytest.fixture(scope="module", autouse=True)
def cost_of_blocks():
    """A step costs its blocks, a twin a quarter of one: what tiny models take on this machine decides no test."""

    def cost(meter, depth):
        return (depth + (meter.num_blocks - depth) / 4) / meter.num_blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "_cost_of", cost)
        yield


@pytest.fixture(scope="module", autouse=True)
def by_operator():
    """By default, not by an option, since a saved rule holds its options."""
    with pytest.MonkeyPatch.context() as patch:
        compile_by_operator(patch)
        yield


@pytest.fixture(scope="module")
def model():
    return make("llama", layers=3)


@pytest.fixture(scope="module", params=list(CRITERIA))
def found(model, request):
    return run(model, {"kl": 0.3}, criterion=request.param)


def logits_of(model, ids):
    """Decodes the end of a text with whatever the model does; returns logits ``[tokens, vocabulary]``."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + TOKENS)
    held = {"use_cache": True, cache_argument(model): cache}
    with torch.inference_mode():
        model(input_ids=ids[:, :CONTEXT], **held)
        steps = [
            model(input_ids=ids[:, i : i + 1], position_ids=torch.tensor([[i]]), **held).logits[:, -1]
            for i in range(CONTEXT, CONTEXT + TOKENS)
        ]
    return torch.cat(steps).double().log_softmax(-1)


@pytest.mark.slow
def test_measured_quality_is_what_the_options_give(model, found):
    """Every rule's KL and depth on all texts, run again through the options alone, with exits leaving their mark."""
    rule = found.chosen
    plain, river_logits = [], []
    for options, into in (({**OPTIONS, "exit_depth": 3}, plain), (found.options, river_logits)):
        torch._dynamo.reset()
        model.compile(backend=river, options=options)
        with trace() as seen:
            into += [logits_of(model, torch.tensor([tokenizer(text)["input_ids"]])) for text in TEXTS]
    model._compiled_call_impl = None
    kl = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(plain, river_logits, strict=True)]
    assert rule.texts == 32
    assert_mean_of_held_out(rule.kl, kl)
    assert_mean_of_held_out(rule.mean_depth, by_text(step.depth for step in seen.tokens))


def by_text(steps: Iterable[float]) -> list[float]:
    """Returns the mean over the tokens of each text."""
    return torch.tensor([float(step) for step in steps]).reshape(len(TEXTS), TOKENS).mean(1).tolist()


def assert_mean_of_held_out(mean: float, texts: Sequence[float]) -> None:
    """The held-out texts are 32 of these 40: their sum lies between those of the 32 smallest and the 32 largest."""
    assert sum(sorted(texts)[:32]) - 1e-4 <= mean * 32 <= sum(sorted(texts)[8:]) + 1e-4


def test_a_budget_that_every_rule_keeps_lets_all_tokens_leave_as_early_as_they_may(found):
    """After the first block, or before it if the criterion knows by then."""
    assert found.chosen.passed
    assert found.chosen.loss < 0.3
    assert found.chosen.mean_depth == (1 if found.base_options["criterion"] == "similarity" else 0)
    rule = {"threshold": found.chosen.threshold, "first_exit": found.chosen.first_exit}
    assert found.options == {**OPTIONS, "criterion": found.base_options["criterion"], **rule}
    assert any(c.kl > 0 for c in found.candidates)


@pytest.mark.parametrize("found", ["confidence"], indirect=True)
def test_a_rule_that_fails_its_test_is_not_chosen_however_cheap(model, found):
    """A budget of just what the chosen rule loses: it is tested once more, and fails."""
    tight = run(model, {"kl": found.chosen.kl}, criterion="confidence")
    failed = [c for c in tight.candidates if c.passed is False]
    assert tight.chosen.passed
    assert min(c.cost for c in failed) < tight.chosen.cost


def test_the_model_is_left_as_it_was(model, found):
    assert model._compiled_call_impl is None


def test_it_can_be_read(found):
    text = str(found)
    assert "guarantee  mean kl at most 0.3 on unseen text of the same kind, confidence 90%" in text
    assert "texts above 1.5 counted as 1.5" in text
    assert "of 3 layers" in text
    assert f"criterion='{found.base_options['criterion']}'" in text
    assert re.search(r"of full depth's time per token: \d+ tokens/s instead of \d+", text)


def test_save_and_load(found, tmp_path):
    assert ExitRule.load(found.save(tmp_path / "calibration.json")) == found


@pytest.mark.slow
def test_a_threshold_for_each_depth_is_chosen_where_it_is_cheapest(model, tmp_path, monkeypatch):
    """Its options decode as it was measured; text and file hold it."""
    cost = Meter.cost
    cheaper = 1e-3
    monkeypatch.setattr(
        Meter, "cost", lambda meter, rule: cost(meter, rule) * (cheaper if isinstance(rule.rule[0], tuple) else 1)
    )
    found = run(model, {"kl": 3.0}, criterion="similarity")
    assert isinstance(found.chosen.threshold, tuple)
    assert len(found.chosen.threshold) == 2, "one for each block but the last"
    model.compile(backend=river, options=found.options)
    with trace() as seen:
        for text in TEXTS:
            logits_of(model, torch.tensor([tokenizer(text)["input_ids"]]))
    model._compiled_call_impl = None
    assert found.chosen.texts == 32
    assert_mean_of_held_out(found.chosen.mean_depth, by_text(step.depth for step in seen.tokens))
    assert str(found.chosen.threshold[1])[:4] in str(found)
    assert ExitRule.load(found.save(tmp_path / "calibration.json")) == found


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 1}', '{"version": 9}', "{", "[" * 100_000, '{"version": 3}']
)
def test_a_damaged_calibration_is_refused(tmp_path, content):
    file = tmp_path / "calibration.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"Cannot read an exit rule from .*calibration\.json"):
        ExitRule.load(file)


def test_a_folder_or_nothing_in_its_place_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="Cannot read an exit rule from"):
            ExitRule.load(place)


@pytest.mark.parametrize(
    "changed", [{"speed": 2}, {"seconds_full_depth": 0.0}, {"base_options": {"criterion": "confidence"}}]
)
def test_a_changed_calibration_is_refused(found, tmp_path, changed):
    file = found.save(tmp_path / "calibration.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match="its hash differs from the one it states"):
        ExitRule.load(file)


def test_a_budget_of_agreement(model):
    """Disagreement is not clipped, and the promise is on the share of tokens."""
    found = run(model, {"agreement": 0.4})
    assert found.base_options["criterion"] == "confidence", "the default"
    assert found.clip == 1.0
    assert found.chosen.agreement == pytest.approx(1 - found.chosen.loss)
    assert found.chosen.agreement > 0.4
    assert "mean agreement at least 0.4" in str(found)


@pytest.mark.slow
def test_the_short_form_of_a_budget(model, found):
    """`kl=0.3` is `budget={"kl": 0.3}`: the same texts, rules and promise, so the same measured quality."""
    short = run(model, None, kl=0.3, criterion=found.base_options["criterion"])
    assert (short.metric, short.budget, short.clip) == ("kl", 0.3, found.clip)
    measured = {(c.threshold, c.first_exit, c.texts): c.kl for c in found.candidates}
    again = {(c.threshold, c.first_exit, c.texts): c.kl for c in short.candidates}
    assert all(measured[key] == again[key] for key in measured.keys() & again.keys())
    assert measured.keys() & again.keys()


@pytest.mark.parametrize("criterion", ["similarity", "confidence"])
@pytest.mark.slow
def test_a_budget_that_no_exit_keeps_is_never_exits(model, criterion, tmp_path):
    """Its options decode as the plain model does, which loses nothing and takes full depth's time."""
    # (With so high a clip one text in which a token exits is too much.)
    found = run(model, {"kl": 1e-9}, MANY, criterion=criterion, clip=4e-8)
    assert (found.chosen.kl, found.chosen.agreement, found.chosen.cost) == (0, 1, 1)
    assert (found.chosen.passed, found.chosen.mean_depth) == (True, 3)
    assert "more texts, better twins or another budget let tokens exit" in str(found)
    assert ExitRule.load(found.save(tmp_path / "calibration.json")) == found
    torch._dynamo.reset()
    model.compile(backend=river, options=found.options)
    with trace() as seen:
        logits_of(model, torch.tensor([tokenizer(TEXTS[0])["input_ids"]]))
    model._compiled_call_impl = None
    assert [step.depth for step in seen.tokens] == [3] * TOKENS


@pytest.mark.slow
def test_a_tighter_budget_is_a_slower_rule(model):
    """Half of what the cheapest rule loses is kept by one that fewer tokens leave by, before none does."""
    loose = run(model, {"kl": 3.0}).chosen
    found = run(model, {"kl": loose.kl / 2})
    tight = found.chosen
    assert tight.loss <= loose.kl / 2
    assert loose.mean_depth < tight.mean_depth < 3
    cheaper = [c for c in found.candidates if c.cost < tight.cost]
    assert cheaper
    assert not any(c.passed for c in cheaper)


def test_too_few_texts_say_how_many_it_takes(model):
    with pytest.raises(BudgetError, match=r"takes at least \d+ texts to test, .* Only 4 are left"):
        run(model, {"kl": 0.3}, texts=TEXTS[:5])


def test_short_texts_are_left_out(model):
    with pytest.raises(BudgetError, match="0 are left"):
        run(model, {"kl": 0.3}, texts=["1 2 3"] * 100)


@pytest.mark.parametrize(
    ("budget", "arguments", "message"),
    [
        ({}, {}, r"budget={} is not allowed; give {\"kl\": 0\.05}"),
        ({"kl": 0.1, "agreement": 0.9}, {}, "is not allowed; give"),
        ({"kl": 0.0}, {}, r"kl=0\.0 is not allowed; it must be a number above 0"),
        ({"agreement": 1.0}, {}, r"agreement=1\.0 is not allowed; it must be a number between 0"),
        ({"kl": 0.1}, {"confidence": 1.0}, r"confidence=1\.0 is not allowed"),
        ({"kl": 0.1}, {"clip": 0.1}, r"clip=0\.1 is not allowed; it must be a number above the budget, 0\.1"),
        ({"kl": 0.1}, {"options": {"threshold": 0.5}}, r"threshold=0\.5 is set by tune_exit"),
        ({"kl": 0.1}, {"options": {"criterion": "confidence"}}, r"Pass criterion='confidence' to tune_exit itself"),
        ({"kl": 0.1}, {"criterion": "trust"}, r"criterion='trust' is not allowed"),
        ({"kl": 0.1}, {"kl": 0.1}, "requires one budget, got {'budget'"),
        (None, {}, "requires one budget, got none"),
        (None, {"kl": -1.0}, r"kl=-1\.0 is not allowed; it must be a number above 0"),
        (None, {"kl": "0.1"}, r"kl='0\.1' is not allowed; it must be a number above 0"),
        ({"agreement": "0.9"}, {}, r"agreement='0\.9' is not allowed; it must be a number between 0 and 1"),
        ({"kl": float("nan")}, {}, r"kl=nan is not allowed"),
        ({"kl": 0.1}, {"confidence": "0.9"}, r"confidence='0\.9' is not allowed; it must be a number between 0 and 1"),
        ({"kl": 0.1}, {"clip": "big"}, r"clip='big' is not allowed; it must be a number above the budget"),
        ({"kl": 0.1}, {"context": 0}, r"context=0 is not allowed; it must be an integer of 1 or more"),
        ({"kl": 0.1}, {"tokens": "16"}, r"tokens='16' is not allowed; it must be an integer of 1 or more"),
        ({"kl": 0.1}, {"texts": None}, r"texts=None is not allowed; it must be a list of strings"),
        ({"kl": 0.1}, {"texts": "1 2 3"}, r"texts='1 2 3' is not allowed; it must be a list of strings"),
        ({"kl": 0.1}, {"texts": ["1 2", None]}, r"texts\[1\]=None is not allowed; it must be a string"),
        ({"kl": 0.1}, {"options": ["rtn"]}, r"options=\['rtn'\] is not allowed; it must be a dict"),
        ({"kl": 0.1}, {"options": {"quantiser": "rtn"}}, "did you mean 'quantizer'"),
    ],
)
def test_bad_arguments_are_refused(model, budget, arguments, message):
    with pytest.raises(OptionError, match=message):
        run(model, budget, **arguments)
