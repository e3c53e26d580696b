"""Exact mode on SmolLM2, compiled through Inductor: the text is the plain model's.

Set RIVER_EXACT_PROMPTS=200 and RIVER_EXACT_TOKENS=100 for a longer proof: prompts of six groups in turn, in float32
and, strictly verified, in bfloat16.
"""

import itertools
import json
import os

import llguidance.hf
import llguidance.torch
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import river_compile
from benchmarks.prompts import mixed
from river_compile.backend import river
from river_compile.cli import shared
from river_compile.decoding.mode import decode, exact
from river_compile.exits import forced_depth
from river_compile.kernels.native.build import choose_isa
from tools import demo_models

PROMPTS, NEW_TOKENS = (int(os.environ.get(f"RIVER_EXACT_{n}", d)) for n, d in (("PROMPTS", 2), ("TOKENS", 40)))
CHATS = tuple(itertools.islice(mixed(), PROMPTS))


def load(dtype):
    """Returns SmolLM2 compiled, and its tokenizer; the static cache has one size for all texts, so one decode graph."""
    model, tokenizer = demo_models.load("smollm2", dtype=dtype)
    model.compile(backend=river, options={"quantizer": "rtn"})
    longest = max(shared.encode(tokenizer, chat).shape[1] for chat in CHATS)
    model._previous_max_cache_length = max(longest, 64) + NEW_TOKENS
    return model, tokenizer


@pytest.fixture(scope="module")
def smollm2():
    """In float32, compiled once for all tests here."""
    return load("float32")


def generate(model, ids, new_tokens=NEW_TOKENS, **options):
    options = {"max_new_tokens": new_tokens, "do_sample": False, "disable_compile": True, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)


def exactly(model, ids, **options):
    return generate(model, ids, custom_generate=exact, num_assistant_tokens_schedule="constant", **options)


def plainly(model, ids, **options):
    """Generates with the compiled model's backbone."""
    with forced_depth(model.config.num_hidden_layers):
        return generate(model, ids, **options)


@pytest.mark.slow
def test_float32_texts_are_the_plain_ones(smollm2):
    """Greedy texts equal those of the same model run eagerly, and of the compiled one's backbone."""
    model, tokenizer = smollm2
    eager, _ = demo_models.load("smollm2", dtype="float32")
    with river_compile.trace() as trace:
        for chat in CHATS:
            ids = shared.encode(tokenizer, chat)
            ours = exactly(model, ids)
            assert torch.equal(ours, generate(eager, ids)), chat
            assert torch.equal(ours, plainly(model, ids)), chat
    kept = trace.kept_sources
    assert kept["river"] > kept["backbone"], "drafts were hardly ever right"


@pytest.mark.slow
def test_stop_strings_stop_where_plain_generation_stops(smollm2):
    """The tokenizer is given to generate, as ever; some of the strings end inside a draft."""
    model, tokenizer = smollm2
    ids, inside = shared.encode(tokenizer, "Write a short story about a lost key."), 0
    for stop in (".", ",", " a", "he"):
        options = {"stop_strings": [stop], "tokenizer": tokenizer}
        with river_compile.trace() as trace:
            ours = exactly(model, ids, **options)
        assert torch.equal(ours, plainly(model, ids, **options))
        assert tokenizer.decode(ours[0, ids.shape[1] :]).count(stop) == 1
        last = trace.cycles[-1]
        inside += len(last.emitted) <= len(last.drafted)
    assert inside, "every text ended after its draft"


class Grammar(LogitsProcessor):
    """Lets through what continues a JSON document of a schema, and remembers how far the text is."""

    def __init__(self, tokenizer, schema: dict, length: int) -> None:
        known = llguidance.hf.from_tokenizer(tokenizer)
        self.matcher = llguidance.LLMatcher(known, llguidance.LLMatcher.grammar_from_json_schema(schema))
        self.mask = llguidance.torch.allocate_token_bitmask(1, known.vocab_size)
        self.read, self.shown = length, []

    def __call__(self, input_ids, scores):
        self.shown.append((input_ids.tolist(), scores.argmax(-1).tolist()))
        assert self.matcher.consume_tokens(input_ids[0, self.read :].tolist()), "shown what the grammar does not allow"
        self.read = input_ids.shape[1]
        llguidance.torch.fill_next_token_bitmask(self.matcher, self.mask)
        scores = scores.clone()
        llguidance.torch.apply_token_bitmask_inplace(scores, self.mask)
        return scores


@pytest.mark.slow
def test_a_grammar_sees_what_plain_generation_shows_it(smollm2):
    """A processor with a memory, that a rejected draft would spoil: a document of a schema comes out, plain's."""
    model, tokenizer = smollm2
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    ids = shared.encode(tokenizer, "Describe Ada Lovelace as JSON with name and age.")
    grammars = [Grammar(tokenizer, schema, ids.shape[1]) for _ in range(2)]
    end = {"eos_token_id": tokenizer.eos_token_id, "new_tokens": 60}
    expected = plainly(model, ids, logits_processor=LogitsProcessorList(grammars[:1]), **end)
    with river_compile.trace() as trace:
        ours = exactly(model, ids, logits_processor=LogitsProcessorList(grammars[1:]), **end)
    assert torch.equal(ours, expected)
    assert grammars[1].shown == grammars[0].shown
    document = json.loads(tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True))
    assert document.keys() == schema["properties"].keys()
    assert trace.cycles
    assert any(cycle.drafted for cycle in trace.cycles)


@pytest.mark.slow
def test_strict_bfloat16_texts_have_the_bits_of_decoding_without_drafts():  # (last: it drops the graphs before)
    """On River's own kernels, whose sums do not depend on the width of a pass."""
    torch._dynamo.reset()
    model, tokenizer = demo_models.load("smollm2", dtype="bfloat16")
    river_compile.accelerate(
        model, strict=True, quantizer="rtn", num_assistant_tokens_schedule="constant", background_packing=False
    )
    for chat in CHATS:
        ids = shared.encode(tokenizer, chat)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with river_compile.trace() as trace:
            ours = model.generate(ids, **options)
        with forced_depth(model.config.num_hidden_layers):
            assert torch.equal(ours, model.generate(ids, custom_generate=decode, **options)), chat
        assert sum(trace.kept_sources.values()) > len(trace.cycles), "no draft was verified"


@pytest.mark.slow
@pytest.mark.skipif(choose_isa().name == "portable", reason="needs vectors")
def test_bfloat16_texts_of_weights_in_12_bits_are_those_of_16():
    """Without loss, so to the bit, in exact mode and without drafts."""
    torch._dynamo.reset()
    accelerated = []
    for weights in ("model", "12bit"):
        model, tokenizer = demo_models.load("smollm2", dtype="bfloat16")
        options = {"quantizer": "rtn", "target_weights": weights, "background_packing": False}
        accelerated.append(river_compile.accelerate(model, strict=True, **options))
    for chat in CHATS:
        ids = shared.encode(tokenizer, chat)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(*(model.generate(ids, **options) for model in accelerated)), chat
