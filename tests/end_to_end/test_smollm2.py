"""End to end on a real model: SmolLM2-135M-Instruct in float32, through Inductor.

Greedy text of 64 tokens is the plain model's with exits off and with an unquantized river at random depths; 4-bit twins
at the default threshold answer in a sentence of their own.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from river_compile import report, river, trace
from river_compile.cli import models
from river_compile.exits import forced_depth

NEW_TOKENS = 64
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


class RandomDepths(LogitsProcessor):
    """Chooses the depth of every next step; logits pass unchanged."""

    def __init__(self, num_blocks: int, stack: contextlib.ExitStack) -> None:
        self._random, self._num_blocks, self._stack = random.Random(0), num_blocks, stack

    def __call__(self, input_ids, scores):
        self._stack.close()
        self._stack.enter_context(forced_depth(self._random.randint(0, self._num_blocks)))
        return scores


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    return models.load("smollm2", dtype=torch.float32)


def answer(model, tokenizer, **options):
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static", **options)
    return tokenizer.decode(out[0, length:])


@pytest.fixture
def plain_text(smollm2):
    model, tokenizer = smollm2
    return answer(model, tokenizer, disable_compile=True)


def test_greedy_text_is_the_plain_models(smollm2, plain_text):
    """One compilation, three ways through it: never leaving by threshold, never by force, and at random depths."""
    model, tokenizer = smollm2
    blocks = len(model.model.layers)
    with compiled(model, {"quantizer": "none", "threshold": 2.0}), trace() as t:
        assert answer(model, tokenizer) == plain_text
        with contextlib.ExitStack() as stack:
            processors = LogitsProcessorList([RandomDepths(blocks, stack)])
            assert answer(model, tokenizer, logits_processor=processors) == plain_text
    depths = [token.depth for token in t.tokens]
    assert set(depths[: NEW_TOKENS - 1]) == {blocks}
    assert len(set(depths[NEW_TOKENS - 1 :])) > 15


def test_default_river_leaves_early_and_stays_sensible(smollm2):
    """At tau 0.7 nearly every token leaves after block 2, and the answer still speaks of light."""
    model, tokenizer = smollm2
    with compiled(model, {}), trace() as t:
        text = answer(model, tokenizer)
    assert 2 <= t.mean_depth < 4
    assert "light" in text
    segments = {g["kind"]: {s["name"]: s["uses"] for s in g["segments"]} for g in report(model).to_dict()["graphs"]}
    assert sorted(segments["prefill"].values()) == [1, 1, 30]
    assert segments["decode"] == {"prologue": 1, "block_1": 2, "block_2": 28, "twin_1": 30, "head": 1, "river_head": 1}


@contextlib.contextmanager
def compiled(model, options):
    model.compile(backend=river, options=options)
    try:
        yield
    finally:
        model._compiled_call_impl = None
