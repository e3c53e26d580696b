"""A graph traced for several tokens, with the length fixed to one, computes a decode step in every family."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

from river_compile.decoding.kv_cache import KVCache
from river_compile.passes.decoder import with_size
from river_compile.passes.normalize import normalized
from river_compile.passes.segments import recognise
from river_compile.upstream.transformers import mark_dynamic
from tests.support.decoding import cache_argument, cache_state, new_cache, run_plainly
from tests.support.families import FAMILIES, each, make, prompt

PROMPT, TOKENS, SLOTS = 3, 2, 8
ALONE = {"mistral", "ministral", "gemma2", "gemma3", "mpt"}  # windows, which Dynamo traces for each length; no blocks


def given(first: int, tokens: int) -> dict[str, Tensor]:
    """Returns ids, positions and mask of the tokens from a slot onwards."""
    ids, places = prompt(8, seed=3)[:, first : first + tokens], torch.arange(first, first + tokens)
    mask = (torch.arange(SLOTS) <= places[:, None])[None, None]
    return {"input_ids": ids.contiguous(), "position_ids": places[None], "attention_mask": mask}


def prompted(model):
    """Returns a static cache that holds a prompt, and arguments of the next forward."""
    cache = new_cache(model, "static", SLOTS)
    held = {"use_cache": True, cache_argument(model): cache}
    run_plainly(model, **given(0, PROMPT), **held)
    return cache, held


@pytest.mark.parametrize("family", each([f for f in FAMILIES if f not in ALONE], quick=["llama", "mixtral"]))
@torch.no_grad()
def test_one_of_several_tokens_is_what_the_model_makes_of_one(family):
    torch._dynamo.reset()
    model, traced = make(family, layers=2), []
    cache, held = prompted(model)

    def keep(graph, inputs):
        traced.append((normalized(graph), [*inputs]))
        return graph.forward

    several = given(PROMPT, TOKENS)
    mark_dynamic({**several, **held})
    torch.compile(model.forward, backend=keep, fullgraph=True)(**several, **held)
    ((graph, inputs),) = traced
    length = recognise(graph, twins=False).plan.query_length.node.expr
    assert isinstance(length, sympy.Symbol)

    one = with_size(graph.graph, length, 1)
    assert recognise(one, twins=False).plan.query_length == 1
    KVCache(cache).rewind(TOKENS)
    own = given(PROMPT, 1)
    instead = {id(several[name]): own[name] for name in own}
    named = {n.name: value for n, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)}
    kept = [named[node.name] for node in one.graph.find_nodes(op="placeholder")]
    logits = one(*(instead.get(id(value), value) for value in kept))[-1]

    other, held = prompted(model)
    torch.testing.assert_close(logits, run_plainly(model, **own, **held).logits)
    for a, b in zip(cache_state(cache), cache_state(other), strict=True):
        assert a[2] == b[2] == PROMPT + 1
        for x, y in zip(a[:2], b[:2], strict=True):
            torch.testing.assert_close(x[:, :, : a[2]], y[:, :, : a[2]])


def test_a_size_that_an_operator_does_not_take_is_its_error():
    """Index 1 is valid for two rows, not for one."""
    traced = []

    def keep(graph, inputs):
        traced.append(normalized(graph))
        return graph.forward

    x = torch.ones(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x.select(0, 1), backend=keep)(x)
    examples = (node.meta.get("example_value") for node in traced[0].graph.nodes)
    rows = next(value for value in examples if isinstance(value, torch.SymInt))
    with pytest.raises(IndexError):
        with_size(traced[0].graph, rows.node.expr, 1)
