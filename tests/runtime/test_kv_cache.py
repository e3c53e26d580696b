"""Texts beyond a sliding window have the plain model's tokens, in a cache whose layers hold all of them.

In float32, against transformers' own generate with its own cache. Also: rows, prefixes and rewinds of a cache.
"""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

import river_compile
from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.reporting.report import Fallbacks
from tests.support.decoding import left_padded
from tests.support.families import SLIDING_WINDOW, each, make, prompt

OPTIONS = {"group_size": 32, "quantizer": "rtn", "compile_cache": False}
QUALITIES = {
    "exact": {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
    "fast": {"threshold": 1.0},
}
WINDOWS = ("gemma3", "mistral", "gpt_oss")


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("name", each(WINDOWS, ["gemma3"]))
def test_texts_beyond_a_window_are_the_plain_models(name, quality):
    """Prompts shorter and longer than the window, one row and several with padding; nothing but full layers."""
    plain = make(name, layers=2)
    model = river_compile.accelerate(make(name, layers=2), quality, **OPTIONS, **QUALITIES[quality])
    options = {"max_new_tokens": 3 * SLIDING_WINDOW, "do_sample": False, "pad_token_id": 0}
    for ids, mask in (
        (prompt(SLIDING_WINDOW - 3), None),
        (prompt(2 * SLIDING_WINDOW + 3), None),
        left_padded(2, 2 * SLIDING_WINDOW),
    ):
        mask = torch.ones_like(ids) if mask is None else mask
        ours, theirs = (each.generate(ids, attention_mask=mask, **options) for each in (model, plain))
        assert torch.equal(ours, theirs)
    record = river_compile.report(model)
    assert not record.record.of(Fallbacks)
    assert record.record.of(PrefixPool).bytes > 0


def write(kv, tokens):
    """Writes numbered tokens to every layer."""
    states = torch.tensor(tokens, dtype=torch.float32).view(len(tokens), 1, -1, 1).expand(-1, 2, -1, 16)
    for layer in range(len(kv.cache.layers)):
        kv.cache.update(states, states, layer)
    kv.filled += states.shape[2]


def shown(kv):
    """Returns the numbers that each row in use holds, in the last layer's values."""
    assert all(int(layer.get_seq_length()) == kv.filled for layer in kv.cache.layers)
    return kv.cache.layers[-1].values[:, 1, : kv.filled, 3].tolist()


@pytest.fixture(params=["llama", "gemma3"])
def model(request):
    return make(request.param, layers=2)


def cache(model, slots=16, rows=1):
    kv = KVCache.of(model, slots, rows)
    assert all(type(layer) is StaticLayer and layer.max_cache_len == slots for layer in kv.cache.layers)
    if kv.cache.layers[0].keys.shape[-1] != 16:  # (heads of other sizes than those of the numbers here)
        for layer in kv.cache.layers:
            layer.lazy_initialization(*(torch.zeros(rows, 2, 0, 16),) * 2)
    return kv


def test_entries_are_freed_and_the_cache_grows(model):
    kv = cache(model, slots=8)
    write(kv, [[1, 2, 3, 4, 5, 6, 7]])
    kv.rewind(3)
    write(kv, [[8]])
    kv.grow(32)
    assert (kv.free_slots, shown(kv)) == (27, [[1, 2, 3, 4, 8]])


def test_a_prefix_goes_to_another_cache_and_nothing_behind_it(model):
    kv, other = cache(model), cache(model, slots=24)
    write(kv, [[1, 2, 3, 4]])
    write(other, [[9] * 20])
    other.begin_with(3, [kv.prefix(4)])
    assert shown(other) == [[1, 2, 3]]
    assert not other.cache.layers[0].keys[:, :, 3:].any()
    kv.begin_with(2)
    assert shown(kv) == [[1, 2]]


def test_what_is_handed_back_is_what_transformers_keeps(model):
    kv, theirs, ours = cache(model, slots=24), *(DynamicCache(config=model.config) for _ in range(2))
    write(kv, [[*range(20)]])
    for number, layer in enumerate(kv.cache.layers):
        theirs.update(layer.keys[:, :, :20], layer.values[:, :, :20], number)
    kv.copy_to(ours)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert a.get_seq_length() == b.get_seq_length()
