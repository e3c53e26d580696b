"""The replay of drafts over recorded texts, and that the record is of the model's own text."""

from __future__ import annotations

import json

import pytest

from benchmarks import acceptance, prompt_sets, replay
from benchmarks.prompt_sets import Prompt
from benchmarks.replay import Seconds, Text
from tests.support.lowerings import UNQUANTIZED
from tools import demo_models

SECONDS = Seconds(
    assistant=1.0, twins=3.0, target={1: 10.0, 2: 10.0, 4: 12.0, 8: 16.0}, twins_passes={1: 3.0, 2: 3.0, 4: 5.0}
)


def text(assistant, twins, same=""):
    """Marks "+" are right, and in `same` alike; by default both drafters are alike if both are right."""
    flags = ([mark == "+" for mark in marks] for marks in (assistant, twins))
    both = [*flags]
    alike = [mark == "+" for mark in same] if same else [a and b for a, b in zip(*both, strict=True)]
    return Text("chat", *both, alike)


def test_a_cycle_ends_at_the_first_wrong_token():
    """The target gives one token more. The assistant takes one step more if none of its tokens was wrong."""
    one = text("++-+", "+-++")
    assert replay.by_assistant(SECONDS, 3)(one, 0) == (3 * 1.0 + 12.0, 3)
    assert replay.by_assistant(SECONDS, 2)(one, 0) == (3 * 1.0 + 12.0, 3)
    assert replay.by_twins(SECONDS, 3)(one, 0) == (3 * 3.0 + 12.0, 2)
    assert replay.by_twins(SECONDS, 1)(one, 1) == (3.0 + 10.0, 1)
    assert replay.undrafted(SECONDS)(one, 2) == (10.0, 1)


def test_two_levels_draft_the_text_of_the_twins():
    """Each of their passes keeps what the assistant had as they have, and adds a token of theirs."""
    one = text("+-++++", "+++-++")  # both have the tokens 0, 2, 4 and 5
    assert replay.two_levels(SECONDS, 3, 1)(one, 0) == (2 * (2.0 + 3.0) + 16.0, 4)
    assert replay.two_levels(SECONDS, 3, 2)(one, 0) == (2 * (2.0 + 5.0) + 16.0, 4)
    assert replay.two_levels(SECONDS, 1, 1)(text("-", "+"), 0) == (1.0 + 3.0 + 10.0, 2)


def test_the_speed_is_that_of_the_whole_text():
    """Drafts of the twins: 13 seconds give two tokens, then one, then one although both were right before the end."""
    one = text("----", "+--+")
    assert replay.speed([one], replay.by_twins(SECONDS, 1)) == pytest.approx(4 / 39)
    assert replay.speed([one], replay.undrafted(SECONDS)) == pytest.approx(4 / 40)
    assert replay.speed([one, one], replay.by_twins(SECONDS, 1)) == pytest.approx(8 / 78)


def test_of_two_ways_each_cycle_has_the_better():
    """The assistant drafts the first half for less, and the twins alone know the second."""
    one = text("+++----+", "-+++++++")
    ways = replay.by_assistant(SECONDS, 3), replay.by_twins(SECONDS, 3)
    # 4 tokens of the assistant's draft in 4 + 12, 4 of the twins' in 9 + 12.
    assert replay.speed([one], *ways) == pytest.approx(8 / 37)
    assert replay.speed([one], *ways) > max(replay.speed([one], way) for way in ways)


def test_the_best_lengths_are_found():
    """Drafters that are never wrong have long drafts, and one that always is has the shortest."""
    best = replay.best([text("+" * 40, "-" * 40)], SECONDS)
    assert (best["assistant"][0], best["twins"][0]) == ("7", "1")
    assert set(best) == {"no drafts", "twins", "assistant", "best of both in each cycle", "two levels"}
    assert best["best of both in each cycle"][0].startswith("7, ")


@pytest.fixture
def tiny(monkeypatch):
    """Two tiny models of the same tokens, of which one drafts for the other; a model has other weights each time."""
    from tests.support.families import make, prompt

    made = {"large": make("llama", layers=3).float(), "small": make("llama", layers=2).float()}
    monkeypatch.setattr(demo_models, "resolve", str)
    monkeypatch.setattr(demo_models, "load", lambda name, dtype: (made[name], None))
    monkeypatch.setitem(demo_models.SMALLER, "large", "small")
    prompts = [Prompt(kind, 1, prompt(6, seed=seed)[0].tolist()) for seed, kind in enumerate(("chat", "code"))]
    monkeypatch.setattr(prompt_sets, "encoded", lambda folder, options: prompts)
    monkeypatch.setattr(acceptance, "DRAFTED", (1, 3))
    monkeypatch.setattr(acceptance, "_TIMED_TOKENS", 6)


@pytest.mark.slow
def test_twins_of_the_same_weights_have_every_token_right(tiny):
    """Unquantized twins draft the model's own text; what a small model has in 16 bits, it has in its twins."""
    options = acceptance._parse(["--model", "large", "--new-tokens", "12"])
    found = acceptance.measure(options, kernels=UNQUANTIZED)
    assert [row["kind"] for row in found["texts"]] == ["chat", "code"]
    for row in found["texts"]:
        assert row["twins"] == [True] * 11
        assert row["assistant"] == row["assistant_16bit"] == row["same"]
    assert not all(flag for row in found["texts"] for flag in row["assistant"])
    assert list(found["seconds"]["target"]) == [1, 2, 4]
    assert min(found["seconds"]["assistant"], found["seconds"]["twins"], *found["seconds"]["target"].values()) > 0


def recorded(folder, **more):
    row = {
        "assistant_16bit": [True] * 4,
        "assistant": [True, False] * 2,
        "twins": [True] * 4,
        "same": [True, False] * 2,
    }
    seconds = {"assistant": 0.001, "twins": 0.003, "target": {"1": 0.010, "2": 0.011, "4": 0.012}}
    file = folder / "recorded.json"
    file.write_text(json.dumps({"texts": [{"kind": kind, **row} for kind in ("chat", "edit")], "seconds": seconds}))
    return ["--recorded", str(file), "--json", str(folder / "out.json")]


def test_a_record_is_replayed_at_other_speeds(tmp_path, capsys):
    assert acceptance.main(recorded(tmp_path)) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["shares"]["all"]["assistant"] == 0.5
    assert found["shares"]["edit"]["twins_if_not_assistant"] == 1.0
    assert found["tokens_per_s"]["no drafts"] == {kind: pytest.approx(100) for kind in ("all", "chat", "edit")}
    assert "passes 1: 10.0, 2: 11.0, 4: 12.0" in capsys.readouterr().out
    given = ["--assistant-ms", "2", "--target-ms", "1=20", "4=20", "--twins-pass-ms", "1=3", "2=4"]
    assert acceptance.main([*recorded(tmp_path), *given]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens_per_s"]["no drafts"]["all"] == pytest.approx(50)
    # Every other token is right: two tokens for two steps and a pass.
    assert found["tokens_per_s"]["assistant"]["all"] == pytest.approx(2 / 0.024)
    assert "assistant's step 2.00, twins' 3.00, passes 1: 20.0, 4: 20.0" in capsys.readouterr().out


@pytest.mark.parametrize("given", [("2=20", "4=20"), ("1=20", "2=20")])
def test_times_are_those_of_one_token_and_of_several(tmp_path, capsys, given):
    assert acceptance.main([*recorded(tmp_path), "--target-ms", *given]) == 1
    assert "give passes of 1 token and of 3 or more" in capsys.readouterr().err
