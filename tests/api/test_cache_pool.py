"""The static cache that a model keeps for its calls, longer where it is full."""

import contextlib
import gc
import sys
import threading
import types
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import river_compile
from river_compile.api.accelerate import empty_cache
from river_compile.decoding import kv_cache, prefix_cache
from river_compile.record import find_record
from river_compile.upstream.transformers import cache_of
from tests.support.families import make, prompt
from tests.support.lowerings import UNQUANTIZED, operators_on
from tests.support.recorder import recording

# (The recorder stands for a device that captures, so that a static cache is what pays.)
OPTIONS = {"group_size": 32, "graphs": True}
QUALITIES = {
    "exact": {"num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"},
    "fast": {"kernels": UNQUANTIZED, "threshold": 2.0},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Room for a few tokens, so that a short text outgrows it."""
    monkeypatch.setattr(prefix_cache, "_AHEAD", 4)
    monkeypatch.setattr(kv_cache, "_STEP", 8)
    with recording():
        yield


def accelerated(family="llama", quality="exact", device="cpu"):
    options = {"kernels": operators_on(device), **OPTIONS, **QUALITIES[quality]}
    return river_compile.accelerate(make(family, layers=2).to(device), quality, **options)


def slots_of(cache):
    return {layer.max_cache_len for layer in cache.layers}


def generate(model, ids, tokens=8, **options):
    mask = (ids > 0).long()  # (padding stands on the left)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **options)


def caches_of(model, monkeypatch):
    """Returns a list that receives the cache of every forward pass."""
    seen, forward = [], type(model).prepare_inputs_for_generation

    def note(self, *args, **kwargs):
        seen.append(cache_of(kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", types.MethodType(note, model))
    return seen


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # full attention; windows of 8 tokens next to it
@pytest.mark.slow
def test_texts_that_outgrow_the_cache_are_plain(family, quality, monkeypatch):
    """Two rows, one of them padded, of which one may fall behind; the second call begins in the long cache."""
    ids = prompt(batch=2)
    ids[0, :2] = 0
    model, plain = accelerated(family, quality), make(family, layers=2)
    seen = caches_of(model, monkeypatch)
    for tokens in (24, 5):
        assert torch.equal(generate(model, ids, tokens), generate(plain, ids, tokens))
        assert max(slots_of(seen[-1])) >= ids.shape[1] + 23


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.slow
def test_later_calls_capture_nothing(quality, device, monkeypatch):
    """What ran once is captured the second time, on the same cache: a short prompt in the third call, if not before."""
    model = accelerated(quality=quality, device=device)
    ids, seen = prompt().to(device), caches_of(model, monkeypatch)
    texts = [generate(model, ids) for _ in range(3)]
    made = [g.captures.made for g in river_compile.report(model).graphs]
    assert sum(made) > 0
    grown = seen[-1]  # (the first text outgrew the first cache)
    seen.clear()
    texts += [generate(model, ids) for _ in range(2)]
    assert [g.captures.made for g in river_compile.report(model).graphs] == made
    assert all(cache is grown for cache in seen)
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.fixture(scope="module")
def fast():
    """A model for calls that are."""
    return accelerated(quality="fast")


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("options", [{"cache_implementation": "dynamic"}, {"past_key_values": DynamicCache}])
def test_callers_who_name_or_bring_a_cache_generate_with_it(quality, options, monkeypatch):
    """Exact mode says so, and runs without drafts."""
    model, ids = accelerated(quality=quality), prompt()
    seen = caches_of(model, monkeypatch)
    options = {name: value() if name == "past_key_values" else value for name, value in options.items()}
    said = pytest.warns(river_compile.RiverWarning, match="runs without River.*cache")
    with said if quality == "exact" else contextlib.nullcontext():
        text = generate(model, ids, **options)
    assert torch.equal(text, generate(make("llama", layers=2), ids))
    assert {type(cache) for cache in seen} == {DynamicCache}
    assert empty_cache(model) == 0


def test_a_static_cache_that_was_asked_for_is_the_models(fast, monkeypatch):
    ids = prompt()
    generate(fast, ids)
    seen = caches_of(fast, monkeypatch)
    generate(fast, ids)
    generate(fast, ids, cache_implementation="static")
    assert len(set(map(id, seen))) == 1
    assert type(seen[0]) is StaticCache


def test_nothing_of_a_text_reaches_the_next(fast, monkeypatch):
    """Not even numbers that are none, behind its end or before it."""
    model, ids = fast, prompt()
    seen = caches_of(model, monkeypatch)
    text = generate(model, ids)
    for layer in seen[-1].layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    assert torch.equal(generate(model, ids), text)


def test_a_call_that_fails_leaves_a_cache_that_works(fast):
    model, ids = fast, prompt()
    text = generate(model, ids)

    def fail(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, stopping_criteria=[fail])
    assert torch.equal(generate(model, ids), text)


def test_calls_at_the_same_time_have_caches_of_their_own(fast):
    model, ids = fast, prompt()
    text, inner = generate(model, ids), []

    def another(_, scores):
        if not inner:
            thread = threading.Thread(target=lambda: inner.append(generate(model, ids)))
            thread.start()
            thread.join()
        return scores

    assert torch.equal(generate(model, ids, logits_processor=[another]), text)
    assert torch.equal(inner[0], text)


def test_a_model_that_goes_with_the_interpreter_says_nothing(monkeypatch):
    """A model in a circle goes after the names of modules: each is None then."""
    model, said = accelerated(quality="fast"), []
    generate(model, prompt())
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(kv_cache, "_tensors", None)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert said == []


def test_the_cache_can_be_freed():
    model = accelerated(quality="fast")
    assert empty_cache(model) == 0
    generate(model, prompt())
    assert "KV cache       0.0 MB" in str(river_compile.report(model))
    assert empty_cache(model) == sum(2 * 2 * 16 * 4 * slots for slots in (32, 32))  # K and V, heads, features, bytes
    assert empty_cache(model) == 0
    generate(model, prompt())
    river_compile.restore(model)
    assert find_record(model) is None
