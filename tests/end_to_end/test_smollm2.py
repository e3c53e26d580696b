"""End to end on a real model: SmolLM2-135M-Instruct in float32, through Inductor and the C++ kernels.

Only a real model can show this. 4-bit twins of trained weights at the default threshold answer in a sentence that
differs from the model's. Thirty blocks compiled for this machine keep the plain model's greedy text of 64 tokens: at
full depth, with verified drafts, and with unquantized twins and random exit depths. Half a minute of one core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, pipeline

from river_compile import report, trace
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.exits import forced_depth
from tests.support.lowerings import UNQUANTIZED_INDUCTOR
from tools import demo_models

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


def answer(model, tokenizer, **options):
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static", **options)
    return tokenizer.decode(out[0, length:])


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    """The model, compiled with the default options, its tokenizer, and the text of the plain model."""
    model, tokenizer = demo_models.load("smollm2", dtype=torch.float32)
    text = answer(model, tokenizer, disable_compile=True)
    model.compile(backend=river)
    return model, tokenizer, text


def test_default_river_leaves_early_and_stays_sensible(smollm2):
    """At tau 0.7 nearly every token leaves after block 2, and the answer still speaks of light."""
    model, tokenizer, plain_text = smollm2
    with trace() as t:
        text = answer(model, tokenizer)
    assert 2 <= t.mean_depth < 4
    assert "light" in text
    graphs = [(g["kind"], {s["name"]: s["uses"] for s in g["segments"]}) for g in report(model).to_dict()["graphs"]]
    assert [1, 1, 30] in [sorted(uses.values()) for kind, uses in graphs if kind == "prefill"]
    steps = {"prologue": 1, "block_1": 2, "block_2": 28, "twin_1": 30, "head": 1, "twin_head": 1}
    assert ("decode", steps) in graphs
    with forced_depth(len(model.model.layers)):
        assert answer(model, tokenizer) == plain_text


@pytest.mark.slow
def test_drafts_of_the_default_river_keep_the_plain_text_in_a_pipeline(smollm2):
    model, tokenizer, plain_text = smollm2
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static")
    options = {"custom_generate": dataclasses.replace(exact, num_assistant_tokens=1), "return_full_text": False}
    with trace() as t:
        (text,) = generator(QUESTION, generation_config=config, **options)
    assert plain_text.startswith(text["generated_text"])
    assert t.kept_sources["river"] > NEW_TOKENS / 5, "drafts were hardly ever right"


@pytest.mark.slow
def test_greedy_text_is_the_plain_models_at_random_depths(smollm2):
    """Of an unquantized river; one compilation, three ways through it: by threshold, by force, and at random."""
    model, tokenizer, plain_text = smollm2
    blocks = len(model.model.layers)
    with compiled(model, {"kernels": UNQUANTIZED_INDUCTOR, "threshold": 2.0}), trace() as t:
        assert answer(model, tokenizer) == plain_text
        with contextlib.ExitStack() as stack:
            processors = LogitsProcessorList([RandomDepths(blocks, stack)])
            assert answer(model, tokenizer, logits_processor=processors) == plain_text
    depths = [token.depth for token in t.tokens]
    assert set(depths[: NEW_TOKENS - 1]) == {blocks}
    assert len(set(depths[NEW_TOKENS - 1 :])) > 15


@contextlib.contextmanager
def compiled(model, options):
    before = model._compiled_call_impl
    model.compile(backend=river, options=options)
    try:
        yield
    finally:
        model._compiled_call_impl = before
