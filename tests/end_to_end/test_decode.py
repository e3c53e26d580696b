"""``custom_generate=decode`` generates what transformers' own loop does, to the bit, in fewer calls."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from river_compile.backend import river
from river_compile.decoding import kv_cache, prefix_cache
from river_compile.decoding.mode import decode
from river_compile.upstream.transformers import cache_of
from tests.support.decoding import cache_state, left_padded
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import UNQUANTIZED

PROMPT = 9  # tokens
NEW_TOKENS = 10


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.fixture(autouse=True)
def _as_many_slots_as_transformers_makes(monkeypatch):
    """Sums over slots have the bits of sums over as many."""
    monkeypatch.setattr(prefix_cache, "_AHEAD", NEW_TOKENS - 1)
    monkeypatch.setattr(kv_cache, "_STEP", 1)


def generate(model, batch=3, **options):
    """Returns everything that a call of generate gives, as one list."""
    ids, mask = left_padded(batch)
    streamer = Streamed() if batch == 1 else None
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "streamer": streamer}
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **wanted, **options}
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)
    state = cache_state(cache_of(out))
    entries = [tensor[:, :, :length] for *tensors, length in state for tensor in tensors]
    entries += [torch.tensor(length) for *_, length in state]
    streamed = [] if streamer is None else [torch.tensor(streamer.ended), *map(torch.tensor, streamer.tokens)]
    return [out.sequences, *out.scores, *out.logits, *entries, *streamed]


def counts_calls(model) -> list:
    """Returns a list that grows with every call of a compiled model."""
    calls, call = [], model._compiled_call_impl
    self = inspect.getclosurevars(call).nonlocals["self"]  # by which River sees that torch.compile made the function

    def counted(*args, **kwargs):
        calls.append(self)
        return call(*args, **kwargs)

    model._compiled_call_impl = counted
    return calls


def notes_preparations(model) -> list[int]:
    """Returns the lengths of the texts whose inputs transformers makes; those of other steps follow from them."""
    made, prepare = [], model.prepare_inputs_for_generation

    def noted(ids, *args, **kwargs):
        made.append(ids.shape[1])
        return prepare(ids, *args, **kwargs)

    model.prepare_inputs_for_generation = noted
    return made


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", slow("granite"), "gemma3"])
def test_text_scores_logits_and_entries_are_those_of_transformers_loop(name):
    """With left padding; transformers makes the inputs of the prompt and two steps, the second one to compare.

    (In a window of 8 slots sums have another order than behind a mask.)
    """
    model = make(name, layers=2)
    theirs = generate(model)
    prepared = notes_preparations(model)
    ours = generate(model, custom_generate=decode)
    assert prepared == [PROMPT, PROMPT + 1, PROMPT + 2]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a, b, **({"rtol": 1e-4, "atol": 1e-4} if name == "gemma3" else {"rtol": 0, "atol": 0})
        )


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
    ours = generate(model, custom_generate=decode, **options)
    theirs = generate(model, **options)
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", ["llama", slow("gpt2"), slow("qwen2")])
def test_compiled_steps_leave_the_model_after_the_first_of_a_call(name):
    """The prompt and one step of each kind go through it and Dynamo; later ones run its graph alone."""
    model = make(name, layers=2)
    model.compile(backend=river, options={"kernels": UNQUANTIZED})
    theirs = generate(model)
    calls = counts_calls(model)
    ours = generate(model, custom_generate=decode)
    assert all(map(torch.equal, ours, theirs))
    assert len(calls) == 2
    calls.clear()
    assert all(map(torch.equal, generate(model, custom_generate=decode), theirs))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search is not available. Remove num_beams=2"),
        (
            {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
            "group_beam_search is not available. Remove num_beams=2 and num_beam_groups=2",
        ),
        ({"penalty_alpha": 0.5, "top_k": 4}, r"contrastive_search is not available. Remove penalty_alpha=0.5\."),
        ({"dola_layers": "low"}, r"dola_generation is not available. Remove dola_layers='low'\."),
        ({"assistant_early_exit": 1}, r"assisted_generation is not available. Remove assistant_early_exit=1\."),
        ({"use_cache": False}, "use_cache=False is not available"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions=True is not available"),
    ],
)
def test_what_it_is_not_for_is_refused(options, message):
    ids = prompt()
    settings = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    with pytest.raises(ValueError, match=message):
        make("llama", layers=1).generate(ids, custom_generate=decode, **settings)
