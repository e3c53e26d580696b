"""KV caches as every supported release of transformers has them; `make compat` runs this with old and new ones."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from river_compile import river
from river_compile.upstream.transformers import (
    DynamicSlidingWindowLayer,
    _RememberingWindow,
    _shows_the_past,
    cannot_crop,
    crop,
    remember_past,
)
from tests.support.families import SLIDING_WINDOW, make

pytestmark = pytest.mark.core
KINDS = ("llama", "mistral")


def write(cache, tokens):
    """Writes numbered tokens to every layer; returns what the last one shows attention ``[slots]``."""
    states = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None]
    return [cache.update(states, states, layer)[0][0, 0, :, 0].tolist() for layer in range(len(cache.layers))][-1]


@pytest.mark.parametrize("name", KINDS)
def test_a_static_cache_gives_its_last_slots_back(name):
    cache = StaticCache(config=make(name, layers=2).config, max_cache_len=20)
    assert cannot_crop(cache) == []
    write(cache, [1, 2, 3, 4])
    crop(cache, 3)
    assert all(int(layer.get_seq_length()) == 1 for layer in cache.layers)
    assert write(cache, [5, 6])[:3] == [1, 5, 6]


@pytest.mark.parametrize("name", KINDS)
def test_a_growing_cache_gives_back_what_left_its_window(name):
    """Several passes between two crops, as drafts are; attention sees no more than the window."""
    cache = DynamicCache(config=make(name, layers=2).config)
    assert cannot_crop(cache) == []
    write(cache, [*range(10)])
    remember_past(cache)
    crop(cache, 0)
    for token in (10, 11, 12):
        shown = write(cache, [token])
        assert shown[-SLIDING_WINDOW:] == [*range(token - SLIDING_WINDOW + 1, token + 1)]
        assert len(shown) == (SLIDING_WINDOW if name == "mistral" else token + 1)
    crop(cache, 3)
    assert write(cache, [20, 21])[-4:] == [8, 9, 20, 21]
    assert all(int(layer.get_seq_length()) == 12 for layer in cache.layers)


def test_a_window_that_shows_what_it_remembers_is_told_from_one_that_does_not():
    class Shows(DynamicSlidingWindowLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            super().update(key_states, value_states)
            return self.keys, self.values

    assert _shows_the_past(Shows)
    assert not _shows_the_past(_RememberingWindow)


def test_generate_on_a_gpu_does_not_compile_a_compiled_model_again(monkeypatch):
    """With Inductor around it nothing of the river would be left; who asks for that gets it."""
    model = make("llama", layers=2)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    cache, config = StaticCache(config=model.config, max_cache_len=8), copy.deepcopy(model.generation_config)

    def compiles() -> bool:
        return model._valid_auto_compile_criteria({"cache": cache, "past_key_values": cache}, config)

    assert compiles()
    model.compile(backend=river)
    assert not compiles()
    config.compile_config = CompileConfig()
    assert compiles()
