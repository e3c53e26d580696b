"""The tool behind `docs/models.md`: what it finds, that it can fail, and that the page is what its results say."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tools.families import __main__ as command
from tools.families import check as checking
from tools.families import results
from tools.families.check import Outcome, check
from tools.families.tiny import draw_weights, tiny_model

WELL = ("rewritten", "partly in 16 bits")


@pytest.mark.parametrize(("model_type", "kind"), [("deepseek_v3", "static"), ("gemma3n_text", "static")])
@pytest.mark.slow
def test_a_family_is_equal_at_every_depth(model_type, kind):
    """Latent attention with shared experts; several streams, and blocks that read another one's keys."""
    found = check(model_type, caches=[kind])
    assert found.result in WELL, found.reason
    assert len(found.depths[kind]) == 4
    assert found.products > 0


def test_a_refusal_is_no_failure():
    """A model of one block is no decoder: plain text, and the reason."""
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=None)

    def build(_):
        model = GPT2LMHeadModel(config).eval()
        draw_weights(model, seed=0)
        return model

    found = check("any", caches=["static"], build=build)
    assert (found.result, found.depths) == ("refused", {})
    assert found.reason.startswith("no decoder layers")


def test_a_difference_is_a_failure(monkeypatch):
    """Quantized twins in place of unquantized ones give other logits: the tool sees them."""
    monkeypatch.setattr(checking, "UNQUANTIZED", checking.FOUR_BITS)
    found = check("gpt2", caches=["static"])
    assert found.result == "failed"
    assert "logits differ" in found.reason


def test_what_cannot_be_built_says_why():
    def build(model_type):
        raise ImportError("no such package")

    assert check("any", build=build) == Outcome("any", "cannot be built", "ImportError: no such package")


@pytest.mark.parametrize(("how", "reason"), [("die", "died with status -9"), ("hang", "no end after 1 s")])
def test_a_type_that_dies_or_hangs_fails(monkeypatch, how, reason):
    """Neither stops the run of the others."""
    code = {"die": "import os; os.kill(os.getpid(), 9)", "hang": "import time; time.sleep(60)"}[how]
    monkeypatch.setattr(command, "check", lambda *_: exec(code))  # (the process is a fork of this one)
    found = command.isolated("any", exact=False, timeout=1 if how == "hang" else 60, verbose=True)
    assert found.result == "failed"
    assert reason in found.reason


def test_tiny_models_repeat_and_lose_no_weight():
    """Equal seeds give equal weights, and no bias is all zero and no norm all one."""
    first, second = (dict(tiny_model("phi").named_parameters()) for _ in range(2))
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        assert len(parameter.unique()) > 1


def parse(text: str) -> dict[str, dict[str, str]]:
    """Returns the rows of the page's tables by model type."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|")] for line in lines]
    rows = [dict(zip(results.COLUMNS, row, strict=True)) for row in cells]
    return {row["model type"].strip("`"): row for row in rows if row["model type"].startswith("`")}


def test_the_page_is_what_the_results_say():
    """docs/models.md follows from docs/models.jsonl, has a row for every model type, and none failed."""
    text, known = results.PAGE.read_text(encoding="utf-8"), results.load()
    assert text == results.page(known)
    rows = parse(text)
    assert set(rows) == set(known)
    assert not [name for name, row in rows.items() if row["accelerate"] in ("failed", "not tried")]
    faster = [name for name, row in rows.items() if row["accelerate"] in ("yes", "no drafts")]
    assert f"`accelerate` speeds up {len(faster)}:" in text


def test_rows_say_what_stays_in_16_bits():
    """Routers and convolutions by their names, since one reason covers all of them."""
    rows = parse(results.PAGE.read_text(encoding="utf-8"))
    reasons = {name: row[results.COLUMNS[-1]] for name, row in rows.items()}
    assert reasons["deepseek_v3"] == "[routers](guides/moe.md) (2)"
    assert reasons["lfm2"].startswith("convolutions (")
    assert reasons["qwen3_moe"] == "[routers](guides/moe.md) (3)"


@pytest.mark.parametrize(("model_type", "how"), [("gpt2", "drafts"), ("gpt_neo", "no drafts"), ("rwkv", "plain")])
def test_accelerate_is_seen_to_draft_or_not(model_type, how):
    """Drafts, River's kernels alone, and transformers' own loop."""
    assert checking.accelerated(tiny_model(model_type)).partition(": ")[0] == how
