"""Rewinding caches of every kind: what a cache shows after a rewind is what it showed before the freed tokens came."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from river_compile.decoding.rewind import RewindableCache
from tests.support.decoding import Halved
from tests.support.families import SLIDING_WINDOW, make

LONGEST = 4


def write(entries, tokens):
    """Writes numbered tokens to every layer; returns what the last one shows attention."""
    states = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None]
    entries.filled += len(tokens)
    return [entries.cache.update(states, states, i)[0][0, 0, :, 0].tolist() for i in range(len(entries.cache.layers))][
        -1
    ]


def start(name, static, tokens):
    """Returns a cache that holds tokens 0, 1, 2, ..."""
    config = make(name, layers=2).config
    cache = StaticCache(config=config, max_cache_len=24) if static else DynamicCache(config=config)
    states = torch.arange(float(tokens))[None, None, :, None]
    for layer in range(2):
        cache.update(states, states, layer)
    return rewindable(cache, LONGEST)


def rewindable(cache, longest: int) -> RewindableCache:
    entries = RewindableCache(cache)
    entries.allow_rewinds(longest)
    return entries


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("held", [3, SLIDING_WINDOW - 1, SLIDING_WINDOW, SLIDING_WINDOW + 3])
def test_drafts_and_rejected_tokens_leave_no_trace(name, static, held):
    """Three cycles of drafts one by one, a wide pass, and a rewind of a part of it, around where a window is full."""
    entries, text = start(name, static, held), [*range(held)]
    for cycle in range(3):
        for draft in range(entries.room - 1):
            write(entries, [100 + draft])
        entries.rewind(entries.filled - len(text))
        width = entries.room
        write(entries, [200 + 10 * cycle + i for i in range(width)])
        kept = (width + 1) // 2
        text += [200 + 10 * cycle + i for i in range(kept)]
        entries.rewind(width - kept)
        entries.mark()
        assert entries.filled == len(text) == int(entries.cache.get_seq_length())
    shown = write(entries, [7])
    seen = ([*text, 7])[-SLIDING_WINDOW:] if name == "mistral" else [*text, 7]
    assert shown[: len(seen)] == seen if static else shown[-len(seen) :] == seen


@pytest.mark.core
def test_quantized_caches_are_refused_by_name():
    """What was quantized together cannot be taken apart again, so a draft could not be taken back."""
    cache = Cache(layers=[Halved()])
    cache.update(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8), 0)
    with pytest.raises(ValueError, match=r"this cache cannot give entries back \(Halved\)"):
        rewindable(cache, LONGEST)


def test_room_ends_with_the_cache_and_where_a_static_window_is_full():
    assert [start("llama", True, n).room for n in (3, 22, 24)] == [LONGEST, 2, 0]
    assert [start("mistral", True, n).room for n in (3, 6, 8, 20)] == [LONGEST, 2, LONGEST, LONGEST]
    assert start("mistral", False, 6).room == LONGEST


def test_passes_before_across_and_after_the_edge_of_a_window_are_told_apart():
    """Their attention reads other numbers of entries, so the bits of one say nothing about the others."""
    for static in (True, False):
        phases = [start("mistral", static, n).phase(3) for n in (3, 5, 6, 8, 20)]
        assert phases[0] == phases[1]
        assert phases[3] == phases[4]
        assert len(set(phases)) == 3
    assert start("llama", True, 3).phase(3) == start("llama", True, 20).phase(3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("held", [3, SLIDING_WINDOW - 1, SLIDING_WINDOW, SLIDING_WINDOW + 3])
def test_rows_that_free_other_numbers_of_tokens_end_in_the_same_slot(name, static, held):
    """Three cycles around where a window is full; then the longest row ends and the others go on without its slots."""
    config = make(name, layers=2).config
    cache = StaticCache(config=config, max_cache_len=24) if static else DynamicCache(config=config)
    texts = [[100 * row + i for i in range(held)] for row in range(3)]
    for layer in range(2):
        cache.update(*[torch.tensor(texts, dtype=torch.float32)[:, None, :, None]] * 2, layer)
    entries, number = rewindable(cache, LONGEST), 1000
    entries.mark()
    for kept in ((3, 1, 2), (1, 3, 1), (1, 1, 3)):
        kept = [min(count, entries.room) for count in kept]
        new = [[number + 10 * row + i for i in range(entries.room)] for row in range(3)]
        number += 100
        write_rows(entries, new)
        for text, tokens, count in zip(texts, new, kept, strict=True):
            text += tokens[:count]
        freed = [len(new[0]) - count for count in kept]
        entries.part(freed, max(map(len, texts)))
        entries.mark()
        check_rows(entries, texts)
    longest = max(range(3), key=lambda row: len(texts[row]))
    others = [len(text) for row, text in enumerate(texts) if row != longest]
    entries.part([0, 0, 0], max(others))
    entries.mark()
    check_rows(entries, [text[-max(others) :] for text in texts])


def write_rows(entries, rows):
    states = torch.tensor(rows, dtype=torch.float32)[:, None, :, None]
    entries.filled += states.shape[2]
    return [entries.cache.update(states, states, i)[0][:, 0, :, 0] for i in range(len(entries.cache.layers))][-1]


def check_rows(entries, texts):
    """One more token sees, before it, the end of each row's text."""
    assert int(entries.cache.get_seq_length()) == entries.filled
    shown = write_rows(entries, [[7]] * len(texts))
    layer = entries.cache.layers[-1]
    window = SLIDING_WINDOW if hasattr(layer, "sliding_window") or layer in entries._static_windows else 99
    end = min(entries.filled, window) if isinstance(layer, StaticLayer) else shown.shape[1]
    for row, text in zip(shown.tolist(), texts, strict=True):
        seen = [*text, 7][-min(window, entries.filled) :]
        assert row[end - len(seen) : end] == seen
    entries.rewind(1)
    entries.mark()
