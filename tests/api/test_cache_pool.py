"""The static cache that a model keeps: lent to calls that say nothing of caches, longer where it is full."""

import threading
import types

import pytest
import torch
from transformers import DynamicCache, StaticCache

import river_compile
from river_compile.api.accelerate import free_cache
from river_compile.model_record import find_record
from river_compile.runtime import cache_pool
from river_compile.upstream.transformers import cache_of, sizes_of
from tests.support.families import CONFIGS, make, prompt
from tools.recorder import recording

# (The recorder stands for a device that captures, so that a static cache is what pays.)
OPTIONS = {"lowering": "eager", "group_size": 32, "cudagraphs": True}
QUALITIES = {"exact": {"max_draft": 1, "adaptive": False}, "fast": {"quantizer": "none", "threshold": 2.0}}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Room for a few tokens, so that a short text outgrows it."""
    monkeypatch.setattr(cache_pool, "_AHEAD", 4)
    monkeypatch.setattr(cache_pool, "_STEP", 8)
    with recording():
        yield


def accelerated(family="llama", quality="exact", **options):
    return river_compile.accelerate(make(family, layers=2), quality, **OPTIONS, **QUALITIES[quality], **options)


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
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # full attention; windows of 8 tokens beside it
@pytest.mark.slow
def test_texts_that_outgrow_the_cache_are_plain(family, quality, monkeypatch):
    """Two rows, one of them padded, of which one may fall behind; the second call begins in the long cache."""
    ids = prompt(batch=2)
    ids[0, :2] = 0
    model, plain = accelerated(family, quality), make(family, layers=2)
    seen = caches_of(model, monkeypatch)
    for tokens in (24, 5):
        assert torch.equal(generate(model, ids, tokens), generate(plain, ids, tokens))
        assert max(sizes_of(seen[-1])) >= ids.shape[1] + 23


def test_windows_alone_stay_as_long_as_they_are(monkeypatch):
    """They show no more of a longer text, and a cache that moved would be captured anew in every call."""
    config = CONFIGS["mistral"](2)
    model = river_compile.accelerate(make("mistral", config=config), "fast", **OPTIONS, **QUALITIES["fast"])
    ids, seen = prompt(), caches_of(model, monkeypatch)
    for _ in range(2):
        assert torch.equal(generate(model, ids, 24), generate(make("mistral", config=config), ids, 24))
    assert sizes_of(seen[0]) == [config.sliding_window] * 2
    assert all(cache is seen[0] for cache in seen)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.slow
def test_later_calls_capture_nothing(quality, device, monkeypatch):
    """What ran once is captured the second time, on the same cache: a short prompt in the third call, if not before."""
    plain = make("llama", layers=2).to(device)
    model = river_compile.accelerate(plain, quality, **OPTIONS, **QUALITIES[quality])
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
def unkept():
    """A model for calls of which none is lent a cache."""
    return accelerated()


@pytest.fixture(scope="module")
def fast():
    """A model for calls that are."""
    return accelerated(quality="fast")


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "dynamic"}, {"return_dict_in_generate": True}, {"cache": DynamicCache()}]
)
def test_callers_who_say_something_of_caches_have_them(options, unkept, monkeypatch):
    """One that they name, one that they get back, one that they bring."""
    model = unkept
    seen = caches_of(model, monkeypatch)
    options = {"past_key_values" if name == "cache" else name: value for name, value in options.items()}
    generate(model, prompt(), **options)
    assert {type(cache) for cache in seen} == {DynamicCache}
    assert free_cache(model) == 0


@pytest.mark.slow
def test_a_static_cache_that_was_asked_for_has_its_length(monkeypatch):
    """It is kept too, and a call that needs a longer one has a longer one."""
    model = accelerated()
    seen, ids = caches_of(model, monkeypatch), prompt()
    for tokens in (8, 30):
        generate(model, ids, tokens, cache_implementation="static")
        assert sizes_of(seen[-1]) == [ids.shape[1] + tokens - 1] * 2
    assert {type(cache) for cache in seen} == {StaticCache}


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


def test_the_cache_can_be_freed():
    model = accelerated(quality="fast")
    assert free_cache(model) == 0
    generate(model, prompt())
    assert "kept cache     0.0 MB" in str(river_compile.report(model))
    assert free_cache(model) == sum(2 * 2 * 16 * 4 * slots for slots in (32, 32))  # K and V, heads, features, bytes
    assert free_cache(model) == 0
    generate(model, prompt())
    river_compile.restore(model)
    assert find_record(model) is None
