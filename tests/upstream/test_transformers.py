"""KV caches as every supported release of transformers has them; `make compat` runs this with old and new ones."""

import copy

import pytest
import torch
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer

from river_compile.backend import river
from river_compile.upstream.transformers import full_static_cache
from tests.support.families import make

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_layers_of_sliding_windows_hold_all_tokens(name):
    cache = full_static_cache(make(name, layers=2), 20)
    assert {(type(layer), layer.max_cache_len) for layer in cache.layers} == {(StaticLayer, 20)}


def test_generate_on_a_gpu_does_not_compile_a_compiled_model_again(monkeypatch):
    """With Inductor around it nothing of River would be left; a caller that asks for that gets it."""
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
