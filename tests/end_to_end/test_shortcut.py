"""How many decode steps run without Dynamo; that they have the bits of those that run through it says `test_steps`."""

from __future__ import annotations

import pytest
import torch

import river_compile
from river_compile.runtime.shortcut import Shortcut
from river_compile.upstream.hf_cache import cache_argument
from tests.support.decoding import left_padded, new_cache
from tests.support.families import make

NEW_TOKENS = 10
DECODE_STEPS = NEW_TOKENS - 1
NOTED = 2  # the step that is seen first, and the one that is noted


@pytest.fixture(scope="module")
def model():
    model = make("llama", layers=2)
    options = {"lowering": "eager", "quantizer": "none", "first_exit": 1}
    model.compile(backend=river_compile.river, options=options)
    return model


def shortcut_of(model) -> Shortcut:
    return model._compiled_call_impl.river_shortcut


def taken(model, **options) -> int:
    """Generates and returns how many steps ran without Dynamo."""
    ids, mask = left_padded(batch=1)
    before = shortcut_of(model).taken if hasattr(model._compiled_call_impl, "river_shortcut") else 0
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **options}
    model.generate(ids, attention_mask=mask, **options)
    return shortcut_of(model).taken - before


def test_on_a_static_cache_all_steps_but_those_that_are_noted(model):
    """Those of another sequence on another cache are noted anew; of a cache that grows none is."""
    caches = [{cache_argument(model): new_cache(model, "static", capacity=64)} for _ in range(2)]
    assert [taken(model, **held) for held in caches][1] == DECODE_STEPS - NOTED + 1
    assert taken(model, **{cache_argument(model): new_cache(model, "dynamic")}) == 0


@torch.no_grad()
def test_a_prompt_and_a_stance_go_through_dynamo(model):
    """A step repeats what the same cache brought before; a prompt ends that, and so does a stance for its steps."""
    ids, _ = left_padded(batch=1)
    cache = new_cache(model, "static")
    held = {"use_cache": True, cache_argument(model): cache}
    model(ids, **held)
    step = {"input_ids": ids[:, :1], **held}
    model(**step)
    shortcut = shortcut_of(model)
    before, counts = shortcut.taken, []
    for _ in range(3):
        model(**step)
        counts.append(shortcut.taken - before)
    assert counts == [0, 1, 2]
    with torch.compiler.set_stance("force_eager"), pytest.warns(river_compile.RiverWarning, match="without the river"):
        model(**step)
    assert shortcut.taken - before == 2
    model(ids, **held)
    model(**step)
    assert shortcut.taken - before == 2


@pytest.mark.slow
def test_exact_mode_drafts_and_verifies_by_it(model):
    mode = river_compile.exact.with_options(prompt_lookup=False, max_draft=3, stop_below=0.0)
    with river_compile.trace() as trace:
        steps = taken(model, custom_generate=mode, max_new_tokens=24, cache_implementation="static")
    assert steps > sum(len(cycle.drafted) for cycle in trace.cycles) - NOTED
