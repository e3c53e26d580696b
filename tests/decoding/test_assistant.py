"""Drafts by a smaller model: the text is the plain model's, and what cannot draft is named.

Models are tiny, in float32 and run by operators, so texts are compared token for token. An assistant with the model's
own weights is accepted nearly always, one with other weights nearly never.
"""

import copy
import functools
import gc
import warnings

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import river_compile
from river_compile.backend import river
from river_compile.decoding.assistant import Assistant
from river_compile.decoding.mode import exact
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.errors import OptionError, RiverWarning
from river_compile.record import find_record
from tests.support.families import VOCABULARY, make, prompt
from tests.support.lowerings import OPERATORS

TWINS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32}
ALONE = {**TWINS, "compile_cache": False, "background_packing": False}
CONSTANT = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.5}


def model_of(layers=2, seed=0):
    return make("llama", torch.float32, layers=layers, seed=seed)


def resized(model, vocabulary):
    """Returns a model with more or fewer tokens, the common ones with the same weights."""
    wider = copy.deepcopy(model)
    wider.resize_token_embeddings(vocabulary, mean_resizing=False)
    return wider


def accelerated(assistant=None, **options):
    """Returns an accelerated model whose assistant has its weights unless there is another, and the plain model."""
    model = model_of()
    assistant = copy.deepcopy(model) if assistant is None else assistant
    plain = copy.deepcopy(model)
    return river_compile.accelerate(model, assistant_model=assistant, **{**ALONE, **options}), plain


def generate(model, ids, **options):
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    torch.manual_seed(7)
    return model.generate(ids, **{**given, **options})


def sources(trace):
    """Returns the sources of drafted tokens, and those of emitted ones."""
    drafted, emitted = ({s for cycle in trace.cycles for s in getattr(cycle, name)} for name in ("drafted", "emitted"))
    return drafted, emitted


@pytest.fixture(scope="module")
def good():
    """A model whose assistant has its weights."""
    return accelerated(**CONSTANT)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 4}], ids=["", "processors"])
def test_the_text_is_that_without_drafts(good, sampling, processors):
    model, plain = good
    ids = prompt(12)
    with river_compile.trace() as trace:
        text = generate(model, ids, **sampling, **processors)
    assert torch.equal(text, generate(plain, ids, **sampling, **processors))
    assert "assistant" in sources(trace)[1]
    assert "river" not in sources(trace)[0]


def test_no_twins_of_the_model_are_made(good):
    model, _ = good
    generate(model, prompt(12))
    assert not river_compile.report(model).to_dict()["matrices"]
    assert model.generation_config.num_assistant_tokens is None


@pytest.mark.parametrize("vocabulary", [VOCABULARY + 32, VOCABULARY - 20], ids=["more tokens", "fewer tokens"])
def test_an_assistant_may_have_another_padding(vocabulary):
    model, plain = accelerated(resized(model_of(), vocabulary), **CONSTANT)
    for seed in range(3):  # (some prompts have tokens that the assistant lacks)
        ids = prompt(12, seed=seed)
        for sampling in ({}, SAMPLED):
            assert torch.equal(generate(model, ids, **sampling), generate(plain, ids, **sampling))


def test_what_an_assistant_with_other_weights_proposes_is_rejected():
    model, plain = accelerated(model_of(seed=3), **CONSTANT)
    ids = prompt(12)
    with river_compile.trace() as trace:
        assert torch.equal(generate(model, ids), generate(plain, ids))
    assert "assistant" in sources(trace)[0]
    assert sum(cycle.accepted for cycle in trace.cycles) < len(trace.cycles)


def test_twins_and_assistant_draft_by_what_they_gain():
    """Both are tried; a call that names an assistant has both without asking."""
    model, small = model_of(), model_of(seed=3)
    plain = copy.deepcopy(model)
    river_compile.accelerate(model, **ALONE)
    ids = prompt(12)
    with river_compile.trace() as trace:
        text = generate(model, ids, assistant_model=small, max_new_tokens=40, prompt_lookup_num_tokens=0)
    assert torch.equal(text, generate(plain, ids, max_new_tokens=40))
    assert {"assistant", "river"} <= sources(trace)[0]
    with river_compile.trace() as trace:
        generate(model, ids, prompt_lookup_num_tokens=0)
    assert "assistant" not in sources(trace)[0]


def test_self_speculation_is_asked_for_or_turned_off():
    both, _ = accelerated(self_speculation=True)
    generate(both, prompt(12))
    assert river_compile.report(both).to_dict()["matrices"]
    model = river_compile.accelerate(model_of(), self_speculation=False, **ALONE)
    with river_compile.trace() as trace:
        text = generate(model, prompt(12))
    assert torch.equal(text, generate(model_of(), prompt(12)))
    assert sources(trace)[0] <= {"lookup"}
    assert not river_compile.report(model).to_dict()["matrices"]


@torch.no_grad()
@pytest.mark.parametrize("others", [1, 3, 12, 40])
def test_an_assistant_takes_in_what_others_drafted(good, others):
    """Tokens that were copied, and a text that continues otherwise than it drafted."""
    model, _ = good
    generate(model, prompt(12))
    small = river_compile.api.generation.mode_of(model).assistant_model
    text, rejected = prompt(20 + others), prompt(24, seed=1)
    rejected[:, :20] = text[:, :20]
    drafter = Assistant(small, VOCABULARY, None)
    drafter.begin(text[:, :20], 0)
    try:
        for length in (20, 21, 22):
            drafter.step(rejected[:, :length])
        drafter.rewind(20)
        found = drafter.step(text)
        fresh = Assistant(small, VOCABULARY, None)
        fresh.begin(text, 0)
        expected = fresh.step(text)
        fresh.close()
    finally:
        drafter.close()
    # (Entries of few tokens come from the twins, in 4 bits.)
    assert torch.cosine_similarity(found, expected) > 0.95


def test_the_last_row_of_a_batch_drafts_behind_its_padding(good):
    model, plain = good
    ids = prompt(12, 2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids = ids.masked_fill(mask == 0, 0)
    new = generate(plain, ids, attention_mask=mask)[:, 12:].tolist()
    options = {"attention_mask": mask, "eos_token_id": sorted({*new[0]} - {*new[1]})}
    with river_compile.trace() as trace:
        text = generate(model, ids, **options)
    assert torch.equal(text, generate(plain, ids, **options))
    assert "assistant" in sources(trace)[1]


def test_prompts_that_came_as_embeddings_are_not_drafted(good):
    """Their ids are unknown, so the assistant has nothing to read."""
    model, plain = good
    embeds = plain.get_input_embeddings()(prompt(12))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with river_compile.trace() as trace:
        text = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(text, plain.generate(inputs_embeds=embeds, **options))
    assert "assistant" not in sources(trace)[0]


def test_a_conversation_is_read_once_by_both_models():
    small = model_of(seed=3)
    model, _ = accelerated(small, **CONSTANT)
    ids = prompt(40)
    text = generate(model, ids)
    generate(model, torch.cat([text, prompt(20, seed=1)], 1))
    reused = [find_record(m).of(PrefixPool).texts.reused for m in (model, small)]
    assert all(tokens >= 40 for tokens in reused), reused


def test_drafts_end_with_a_token_that_the_assistant_doubts(good):
    """By transformers' argument, of the call or of the assistant's own configuration."""
    model, plain = good
    ids = prompt(12)
    with river_compile.trace() as trace:
        text = generate(model, ids, assistant_confidence_threshold=1.0, prompt_lookup_num_tokens=0)
    assert torch.equal(text, generate(plain, ids))
    assert max(len(cycle.drafted) for cycle in trace.cycles) == 1
    small = copy.deepcopy(plain)
    small.generation_config.update(num_assistant_tokens=2, num_assistant_tokens_schedule="constant")
    with river_compile.trace() as trace:
        generate(
            model, ids, assistant_model=small, prompt_lookup_num_tokens=0, num_assistant_tokens_schedule="constant"
        )
    assert max(len(cycle.drafted) for cycle in trace.cycles) in (2, 3)


def test_an_assistant_drafts_as_far_as_its_positions_reach():
    small = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
    ).eval()
    model, plain = accelerated(small, **CONSTANT)
    for length in (8, 40):
        with river_compile.trace() as trace:
            text = generate(model, prompt(length), max_new_tokens=30)
        assert torch.equal(text, generate(plain, prompt(length), max_new_tokens=30))
        assert ("assistant" in sources(trace)[0]) == (length == 8)


def test_a_compiled_model_takes_an_assistant_in_exact_mode():
    model = model_of()
    model.compile(backend=river, options=TWINS)
    ids, options = prompt(12), {"custom_generate": exact, "cache_implementation": "static", "disable_compile": True}
    with river_compile.trace() as trace:
        text = generate(model, ids, assistant_model=copy.deepcopy(model_of()), **CONSTANT, **options)
    assert torch.equal(text, generate(model_of(), ids, cache_implementation="static", disable_compile=True))
    assert "assistant" in sources(trace)[1]


def test_clients_of_a_batch_share_the_assistant(good):
    model, plain = good
    prompts = [prompt(12), prompt(9, seed=1)]
    with river_compile.ContinuousBatch(model, max_num_seqs=2) as batch, river_compile.trace() as trace:
        texts = [batch.submit(functools.partial(generate, model, ids)) for ids in prompts]
        texts = [text.result() for text in texts]
        alone = batch.submit(functools.partial(generate, model, prompts[0])).result()
    for text, ids in zip([*texts, alone], [*prompts, prompts[0]], strict=True):
        assert torch.equal(text, generate(plain, ids))
    assert "assistant" in sources(trace)[0]


@pytest.mark.parametrize(
    ("assistant", "message"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=5000, hidden_size=32, intermediate_size=32,
                                              num_hidden_layers=1, num_attention_heads=2)).eval(),
         "it has other tokens"),
        (lambda: "a name", "it is no model of transformers"),
        (lambda: river_compile.accelerate(model_of(), "fast", exit_depth=1, **TWINS), "exit_depth=1"),
    ],
    ids=["tokens", "no model", "fixed depth"],
)  # fmt: skip
def test_what_cannot_draft_is_named(assistant, message):
    with pytest.raises(OptionError, match=message):
        river_compile.accelerate(model_of(), assistant_model=assistant(), **ALONE)


def test_a_call_whose_assistant_cannot_draft_runs_in_transformers_with_one_warning(good):
    """transformers knows assistants with other tokens, by their tokenizers, and raises its own error without."""
    model, _ = good
    other = resized(model_of(), 5000)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(ValueError, match="different tokenizers"):
                generate(model, prompt(12), assistant_model=other)
    (warning,) = [w for w in said if issubclass(w.category, RiverWarning)]
    assert "it has other tokens (5000 instead of" in str(warning.message)


def test_early_exits_take_no_assistant():
    with pytest.raises(OptionError, match=r"assistant_model=.* requires quality='exact'"):
        river_compile.accelerate(model_of(), "fast", assistant_model=model_of(), **ALONE)


@pytest.mark.slow
def test_restore_frees_the_assistant_too():
    """Unless the caller accelerated it."""
    small, own = model_of(), river_compile.accelerate(model_of(), **ALONE)
    for assistant, stays in ((small, False), (own, True)):
        model, _ = accelerated(assistant)
        generate(model, prompt(12))
        river_compile.restore(model)
        assert (find_record(assistant) is not None) == stays
    del model
    gc.collect()
    assert torch.equal(generate(small, prompt(5)), generate(model_of(), prompt(5)))


def test_copies_of_a_model_have_no_assistant(good):
    model, plain = good
    copied = copy.deepcopy(model)
    assert torch.equal(generate(copied, prompt(12), generation_config=GenerationConfig(max_new_tokens=4)),
                       generate(plain, prompt(12), generation_config=GenerationConfig(max_new_tokens=4)))  # fmt: skip
