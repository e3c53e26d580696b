"""No graph is compiled twice because something has grown, and after a short warm-up none at all."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from river_compile import accelerate, report
from river_compile.backend import river
from tests.support.decoding import cache_argument
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "threshold": -1.0, "first_exit": 1}
LONGEST = 300
NEW_TOKENS = 3


@pytest.mark.core
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prompts_of_1_to_300_tokens(kind):
    """Warm-up: two lengths (the second makes the length dynamic) and a single token. Then every length must run."""
    model = make("llama", layers=2)
    model.compile(backend=river, options=OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=LONGEST + NEW_TOKENS) if kind == "static" else None

    def generate(length: int) -> torch.Tensor:
        held = {}
        if cache is not None:
            cache.reset()
            held[cache_argument(model)] = cache
        ids = prompt(length)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **held)

    for length in (5, 9, 1, 2):
        generate(length)
    compiled = len(report(model).graphs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (*range(1, 33), *range(37, LONGEST, 13), LONGEST):
            assert generate(length).shape == (1, length + NEW_TOKENS)
    assert len(report(model).graphs) == compiled


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_that_grows_takes_one_graph_of_prompts_and_two_of_steps(padded):
    """By Dynamo's own rule: a size is dynamic from the second time on that it is another."""
    model = make("llama", layers=2)
    model.compile(backend=river, options=OPTIONS)
    ids = prompt(7, 3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0 if padded else 1
    for _ in range(2):
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert len(report(model).graphs) == 3


def test_a_model_whose_first_call_is_a_step_takes_one_graph_of_steps():
    """What was traced before anything could be marked serves what comes after."""
    model = make("llama", layers=2)
    model.compile(backend=river, options=OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=12)
    held = {cache_argument(model): cache, "use_cache": True}
    mask = torch.ones(1, 12, dtype=torch.int64)
    with torch.no_grad():
        model.forward(input_ids=prompt(4), **held)
        for position in range(4, 9):
            places = torch.tensor([[position]])
            model(input_ids=prompt(1), attention_mask=mask, position_ids=places, **held)
    assert len(report(model).graphs) == 1


def test_batches_of_any_size_run_in_the_graphs_of_the_first_batch():
    """A single row has separate graphs; two rows make their number dynamic, and three to seven compile nothing."""
    model = accelerate(make("llama", layers=2), kernels=OPERATORS, quantizer="rtn", group_size=32)

    def compiled_after(rows):
        model.generate(prompt(6, rows), max_new_tokens=6, do_sample=False)
        return len(report(model).graphs)

    compiled_after(1)
    after_two = compiled_after(2)
    assert [compiled_after(rows) for rows in (3, 4, 7, 1)] == [after_two] * 4
