"""``custom_generate=river_compile.decode`` generates what transformers' own loop does, to the bit, in fewer calls."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile import CacheFullError, generation
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
    entries = [tensor[:, :, :length] for *tensors, length in cache_state(cache) for tensor in tensors]
    entries += [torch.tensor(length) for *_, length in cache_state(cache)]
    streamed = [] if streamer is None else [torch.tensor(streamer.ended), *map(torch.tensor, streamer.tokens)]
    return [out.sequences, *out.scores, *out.logits, *entries, *streamed]


def prepared_by_transformers(model, **options) -> tuple[list[torch.Tensor], list[int]]:
    """Generates in our loop; returns everything, and of which passes transformers made the inputs (0: the prompt)."""
    passes, prepare = [], model.prepare_inputs_for_generation

    def note(ids, *args, **kwargs):
        passes.append(ids.shape[1] - left_padded(1)[0].shape[1])
        return prepare(ids, *args, **kwargs)

    model.prepare_inputs_for_generation = note
    ours = generate(model, custom_generate=river_compile.decode, **options)
    del model.prepare_inputs_for_generation
    return ours, passes


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
def test_text_scores_logits_and_entries_are_those_of_transformers_loop(name, kind, own):
    """With left padding; transformers makes the inputs of two steps, the second one to compare."""
    model = make(name, layers=2)
    ours, prepared = prepared_by_transformers(model, kind=kind)
    theirs = generate(model, kind)
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))
    assert prepared == ([0, 1, 2] if own else [*range(NEW_TOKENS)])


def test_inputs_of_windows_that_fill_up_follow_until_then():
    config = CONFIGS["gemma3"](2)
    config.sliding_window = 14  # five steps more than the prompt has tokens
    model = make("gemma3", layers=2, config=config)
    ours, prepared = prepared_by_transformers(model)
    assert prepared == [0, 1, 2, 6, 7, 8, 9]
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


def test_compiled_steps_are_those_of_transformers_loop_and_a_full_cache_is_an_error():
    model = make("llama", layers=2)
    model.compile(backend=river_compile.river, options={"lowering": "eager", "quantizer": "none"})
    assert all(map(torch.equal, generate(model, custom_generate=river_compile.decode), generate(model)))
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


@pytest.fixture
def order(monkeypatch):
    """Steps are queued ahead, as on a GPU; notes when one is queued and when what the one before chose is read."""
    noted: list[str] = []
    following, read = generation._Steps.next, generation._Told.read

    def note_step(self):
        noted.append("step")
        return following(self)

    def note_read(self):
        noted.append("read")
        return read(self)

    monkeypatch.setattr(generation, "runs_late", lambda device: True)
    monkeypatch.setattr(generation._Steps, "next", note_step)
    monkeypatch.setattr(generation._Told, "read", note_read)
    return noted


def end_token(model, after: int) -> int:
    """Returns the token that a text of one row has at a place, and not before."""
    ids, mask = left_padded(1)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    token = int(text[after])
    assert token not in text[:after].tolist()
    return token


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_queued_before_the_host_reads_what_was_chosen(order, batch, options):
    """The same text, scores, entries and state of the generator; the last step of a full text is not queued."""
    model = make("llama", layers=2)
    ours = generate(model, batch=batch, custom_generate=river_compile.decode, **options)
    drawn = torch.rand(1)
    theirs = generate(model, batch=batch, **options)
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(drawn, torch.rand(1))
    assert order == ["step", "read"] * (NEW_TOKENS - 1) + ["read"]


@pytest.mark.parametrize("river", [False, True], ids=["plain", "recorded"])
def test_a_step_behind_the_end_of_a_text_is_taken_back(order, river):
    """The cache has the length, and the entries up to it, that transformers' loop leaves."""
    model = make("llama", layers=2)
    ends = {"eos_token_id": end_token(model, after=3), "pad_token_id": 0, "batch": 1}
    if river:
        model.compile(
            backend="river", options={"cudagraphs": "record", "lowering": "eager", "quantizer": "rtn", "group_size": 32}
        )
    theirs = generate(model, **ends)
    ours = generate(model, custom_generate=river_compile.decode, **ends)
    assert ours[0].shape[1] < left_padded(1)[0].shape[1] + NEW_TOKENS
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))
    assert order == ["step", "read"] * 4


def test_a_full_cache_queues_nothing_that_may_not_be_wanted(order):
    """A text that ends where its cache is full raises nothing."""
    model = make("llama", layers=2)
    ids, mask = left_padded(1)
    ends = {"eos_token_id": end_token(model, after=3), "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    cache = new_cache(model, "static", capacity=ids.shape[1] + 3)
    arguments = {cache_argument(model): cache, "custom_generate": river_compile.decode, "do_sample": False}
    text = model.generate(ids, attention_mask=mask, **arguments, **ends)
    assert text.shape[1] == ids.shape[1] + 4
    assert order == ["step", "read"] * 3 + ["read"]


def test_a_sliding_window_is_not_pushed_on_before_it_is_known_that_a_token_follows(order):
    model = make("gemma3", layers=2)
    ours = generate(model, custom_generate=river_compile.decode)
    assert all(map(torch.equal, ours, generate(model)))
    assert order == ["read", "step"] * (NEW_TOKENS - 1) + ["read"]
