"""``custom_generate=river_compile.decode`` generates what transformers' own loop does, to the bit, in fewer calls."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile import CacheFullError
from river_compile.runtime.pass_inputs import PassInputs
from river_compile.upstream.hf_cache import cache_argument
from tests.support.decoding import cache_state, left_padded, new_cache
from tests.support.families import CONFIGS, make, prompt

NEW_TOKENS = 10


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended = True


def generate(model, kind="static", batch=3, **options):
    """Returns everything that a call of generate gives, as one list."""
    ids, mask = left_padded(batch)
    cache, streamer = new_cache(model, kind, capacity=32), Streamed() if batch == 1 else None
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "streamer": streamer}
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **wanted, **options}
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=mask, **{cache_argument(model): cache}, **settings)
    entries = [tensor for state in cache_state(cache) for tensor in state[:2]]
    streamed = [] if streamer is None else [torch.tensor(streamer.ended), *map(torch.tensor, streamer.tokens)]
    return [out.sequences, *out.scores, *out.logits, *entries, *streamed]


@pytest.fixture
def prepared(monkeypatch):
    """Notes for each step whether transformers made its inputs; else they follow from those of a step before."""
    made, of = [], PassInputs.of

    def note(self, ids, width, slot, prepare):
        made.append(False)

        def prepared():
            made[-1] = True
            return prepare()

        return of(self, ids, width, slot, prepared)

    monkeypatch.setattr(PassInputs, "of", note)
    return made


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [
        ("llama", "static", True),
        ("qwen2", "static", True),  # masks by kind of attention
        ("gpt2", "static", True),
        ("granite", "static", True),
        ("gemma3", "static", False),  # full sliding windows
        ("llama", "dynamic", False),
    ],
)
def test_text_scores_logits_and_entries_are_those_of_transformers_loop(name, kind, own, prepared):
    """With left padding; transformers makes the inputs of two steps, the second one to compare."""
    model = make(name, layers=2)
    ours = generate(model, kind, custom_generate=river_compile.decode)
    theirs = generate(model, kind)
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))
    assert prepared == [True, True] + [not own] * (NEW_TOKENS - 3)


def test_inputs_of_windows_that_fill_up_follow_until_then(prepared):
    config = CONFIGS["gemma3"](2)
    config.sliding_window = 14  # five steps more than the prompt has tokens
    model = make("gemma3", layers=2, config=config)
    ours = generate(model, custom_generate=river_compile.decode)
    assert prepared == [True, True, False, False, False, True, True, True, True]
    assert all(map(torch.equal, ours, generate(model)))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"repetition_penalty": 1.3, "batch": 1},  # with a streamer
        {"eager": True},
        {"eos_token_id": list(range(0, 128, 3)), "pad_token_id": 5},  # rows end one after the other
    ],
    ids=["sampling", "streamer", "eager attention", "ends"],
)
def test_options_mean_the_same(options):
    model = make("llama", layers=2, attention="eager" if options.pop("eager", False) else None)
    ours = generate(model, custom_generate=river_compile.decode, **options)
    theirs = generate(model, **options)
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


def test_compiled_steps_take_the_shortcut():
    model = make("llama", layers=2)
    model.compile(backend=river_compile.river, options={"lowering": "eager", "quantizer": "none"})
    ours = generate(model, custom_generate=river_compile.decode)
    taken = model._compiled_call_impl.river_shortcut.taken
    assert taken == NEW_TOKENS - 1 - 2
    assert all(map(torch.equal, ours, generate(model)))
    with pytest.raises(CacheFullError, match="holds 32 tokens"):
        generate(model, max_new_tokens=40, custom_generate=river_compile.decode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search; leave out num_beams"),
        ({"use_cache": False}, "leave out use_cache=False"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions=True is not available"),
    ],
)
def test_what_it_is_not_for_is_refused(options, message):
    ids = prompt()
    settings = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    with pytest.raises(ValueError, match=message):
        make("llama", layers=1).generate(ids, custom_generate=river_compile.decode, **settings)
