"""Drafts by a checkpoint's own MTP layers: they are those of transformers, and the text is the plain model's.

Checkpoints are tiny, in float32 and run by operators, so tokens are compared one by one.
"""

import functools
import gc
import warnings
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import candidate_generator

import river_compile
from river_compile.backend import river
from river_compile.decoding import mtp
from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.mode import exact
from river_compile.decoding.mtp import Mtp
from river_compile.decoding.passes import Passes
from river_compile.decoding.prompt import Prompt
from river_compile.errors import OptionError, RiverWarning
from river_compile.exits import WHOLE
from river_compile.model_state import model_state
from river_compile.record import find_record
from river_compile.runtime.captures import CaptureLog
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream import mtp as upstream
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS
from tests.support.mtp import checkpoint, load, needs_mtp, register

pytestmark = needs_mtp

TWINS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32}
ALONE = {**TWINS, "compile_cache": False, "background_packing": False}
CONSTANT = {"num_assistant_tokens_schedule": "constant", "prompt_lookup_num_tokens": 0}
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.5}
SOME_RIGHT = 0.008  # a gain with which a third of the proposals is right
HEADS = [("glm4_moe", 1), ("glm4_moe", 3), ("deepseek_v3", 2), ("mellum", 1)]  # families, and numbers of MTP layers


@pytest.fixture(autouse=True)
def _many_models():
    """All of them are of a few classes, whose graphs count together."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes checkpoints, each once."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield functools.cache(functools.partial(checkpoint, tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def accelerated(folder):
    """Makes accelerated models, each once."""
    return functools.cache(lambda *head, **options: river_compile.accelerate(load(folder(*head)), **ALONE, **options))


@pytest.fixture(scope="module")
def plain(folder):
    """Loads models, each once."""
    return functools.cache(lambda *head: load(folder(*head)))


def generate(model, ids, **options):
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    torch.manual_seed(7)
    return model.generate(ids, **{**given, **options})


def drafted(trace):
    """Returns how many tokens were drafted by each source, and how many of the MTP layers' were kept."""
    names = [source for cycle in trace.cycles for source in cycle.drafted]
    kept = [source for cycle in trace.cycles for source in cycle.emitted]
    return {source: names.count(source) for source in {*names}}, kept.count("mtp")


def proposed_by_transformers(monkeypatch, model, ids, **options):
    """Returns the tokens that transformers' candidate generator proposes, by the number of ids before them."""
    proposed, theirs = {}, candidate_generator.MTPCandidateGenerator.get_candidates

    def get_candidates(self, input_ids, *args, **kwargs):
        found = theirs(self, input_ids, *args, **kwargs)
        tokens = found[0][0, input_ids.shape[1] :].tolist()
        proposed.update({(input_ids.shape[1], number): token for number, token in enumerate(tokens)})
        return found

    monkeypatch.setattr(candidate_generator.MTPCandidateGenerator, "get_candidates", get_candidates)
    generate(model, ids, use_mtp=True, **options)
    return proposed


@pytest.fixture
def ours(monkeypatch):
    """The tokens that the layers propose, by the number of ids before the draft and their number in it."""
    proposed, step = {}, Mtp.step

    def noting(self, ids):
        number = self._steps
        logits = step(self, ids)
        proposed[ids.shape[1] - number, number] = int(logits.argmax())
        return logits

    monkeypatch.setattr(Mtp, "step", noting)
    return proposed


@pytest.mark.parametrize("head", [*HEADS[:2], *map(slow, HEADS[2:])], ids=lambda head: f"{head[0]}-{head[1]}")
@pytest.mark.parametrize("length", [12, 5])  # (transformers takes no prompt of fewer tokens than layers)
def test_the_layers_propose_what_transformers_does(monkeypatch, accelerated, plain, ours, head, length):
    """Position by position, whatever was accepted before; behind the last verified token, sliding windows included."""
    model = accelerated(*head, SOME_RIGHT, use_mtp=True, **CONSTANT)
    ids = prompt(length)
    expected = proposed_by_transformers(monkeypatch, plain(*head, SOME_RIGHT), ids)
    with river_compile.trace() as trace:
        text = generate(model, ids)
    assert torch.equal(text, generate(plain(*head, SOME_RIGHT), ids))
    assert ours == {place: expected[place] for place in ours}
    assert {number for _, number in ours} == {*range(head[1])}
    counts, kept = drafted(trace)
    assert counts == {"mtp": len(ours)}
    assert 0 < kept < len(ours)


@pytest.mark.parametrize("head", [("glm4_moe", 1), ("glm4_moe", 3)], ids=["1 layer", "3 layers"])
def test_right_proposals_are_kept(accelerated, plain, head):
    model, ids = accelerated(*head, 0.0, use_mtp=True, **CONSTANT), prompt(12)
    with river_compile.trace() as trace:
        text = generate(model, ids)
    assert torch.equal(text, generate(plain(*head, 0.0), ids))
    counts, kept = drafted(trace)
    assert counts == {"mtp": kept}
    assert len(trace.cycles) <= 23 // (head[1] + 1) + 1


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 4}], ids=["", "processors"])
def test_the_text_is_that_without_drafts(accelerated, plain, sampling, processors):
    """With copies from the context."""
    model = accelerated("glm4_moe", 3, 0.0, use_mtp=True, num_assistant_tokens_schedule="constant")
    for seed in range(2):
        ids = prompt(12, seed=seed)
        with river_compile.trace() as trace:
            text = generate(model, ids, **sampling, **processors)
        assert torch.equal(text, generate(plain("glm4_moe", 3, 0.0), ids, **sampling, **processors))
        assert "mtp" in drafted(trace)[0]
        assert "river" not in drafted(trace)[0]


def test_no_twins_of_the_model_are_made_unless_they_are_asked_for(accelerated):
    for asked in ({}, {"self_speculation": True}):
        model = accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True, **asked)
        generate(model, prompt(12))
        assert bool(river_compile.report(model).to_dict()["matrices"]) == bool(asked)


@pytest.fixture(scope="module")
def twins(accelerated):
    """A model whose twins draft unless a call asks for other drafts."""
    return accelerated("glm4_moe", 1, SOME_RIGHT)


@pytest.mark.parametrize("by", ["keyword", "config"])
def test_a_call_asks_for_the_layers_or_declines_them(accelerated, twins, plain, by):
    """Calls with and without share a KV cache, and the programs that are bound to it."""
    declining, ids = accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True), prompt(20)
    for asked in (False, True, False, True):
        options = {"use_mtp": asked} if by == "keyword" else {"generation_config": GenerationConfig(use_mtp=asked)}
        options |= CONSTANT
        for model in (twins, declining):
            with river_compile.trace() as trace:
                text = generate(model, ids, **options)
            assert torch.equal(text, generate(plain("glm4_moe", 1, SOME_RIGHT), ids))
            assert ("mtp" in drafted(trace)[0]) == asked


def test_a_call_of_no_drafts_makes_none(accelerated):
    with river_compile.trace() as trace:
        generate(accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True), prompt(12), num_assistant_tokens=0)
    assert not drafted(trace)[0]


def test_a_conversation_runs_its_whole_prompt_again(accelerated, plain, ours):
    """Its first tokens have KV entries, but their hidden states are gone."""
    model, fresh = (accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True, **CONSTANT) for _ in range(2))
    ids = generate(model, prompt(40))
    longer = torch.cat([ids, prompt(20, seed=1)], dim=1)
    ours.clear()
    text, again = generate(model, longer), {**ours}
    ours.clear()
    river_compile.empty_cache(fresh)
    assert torch.equal(text, generate(fresh, longer))
    assert torch.equal(text, generate(plain("glm4_moe", 1, SOME_RIGHT), longer))
    assert again == ours != {}


def test_a_prompt_behind_padding_and_one_in_pieces(accelerated, plain, ours):
    model, ids = accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True, **CONSTANT), prompt(12)
    expected, proposed = generate(model, ids), {**ours}
    ours.clear()
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), expected)
    assert proposed == ours
    ours.clear()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    text = generate(model, padded, attention_mask=(torch.arange(17) >= 5).long()[None])
    assert torch.equal(text[:, 5:], expected)
    assert proposed == {(place - 5, number): token for (place, number), token in ours.items()}


def test_a_text_may_end_within_a_draft(accelerated, plain):
    model, ids = accelerated("glm4_moe", 3, 0.0, use_mtp=True, **CONSTANT), prompt(12)
    new = generate(plain("glm4_moe", 3, 0.0), ids)[0, 12:].tolist()
    for token in new[1:4]:
        text = generate(model, ids, eos_token_id=token)
        assert torch.equal(text, generate(plain("glm4_moe", 3, 0.0), ids, eos_token_id=token))


@pytest.mark.slow
def test_rows_of_a_batch_and_embeddings_are_not_drafted(accelerated, plain):
    """Also not the last row, which drafts by other sources; nothing is refused."""
    model, theirs = (source("glm4_moe", 1, SOME_RIGHT) for source in (accelerated, plain))
    ids = prompt(12, 2)
    new = generate(theirs, ids)[:, 12:].tolist()
    options = {"eos_token_id": sorted({*new[0]} - {*new[1]})}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RiverWarning)
        with river_compile.trace() as trace:
            text = generate(model, ids, use_mtp=True, **options)
        assert torch.equal(text, generate(theirs, ids, **options))
        assert "mtp" not in drafted(trace)[0]
        embeds = theirs.get_input_embeddings()(prompt(12))
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        with river_compile.trace() as trace:
            text = model.generate(inputs_embeds=embeds, use_mtp=True, **options)
        assert torch.equal(text, theirs.generate(inputs_embeds=embeds, **options))
        assert "mtp" not in drafted(trace)[0]


def test_the_only_call_of_a_batch_drafts(accelerated, plain):
    model = accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True, **CONSTANT)
    prompts = [prompt(12), prompt(9, seed=1)]
    with river_compile.ContinuousBatch(model, max_num_seqs=2) as batch:
        for ids in (*prompts, prompts[0]):
            with river_compile.trace() as trace:
                text = batch.submit(functools.partial(generate, model, ids)).result()
            assert torch.equal(text, generate(plain("glm4_moe", 1, SOME_RIGHT), ids))
            assert "mtp" in drafted(trace)[0]
        texts = [batch.submit(functools.partial(generate, model, ids)) for ids in prompts]
        for ids, text in zip(prompts, texts, strict=True):
            assert torch.equal(text.result(), generate(plain("glm4_moe", 1, SOME_RIGHT), ids))


def test_a_compiled_model_drafts_in_exact_mode(folder, plain, ours, accelerated):
    """Its prompt runs through the model, and its hidden states are those of the graph that it reaches."""
    model, ids = load(folder("glm4_moe", 1, SOME_RIGHT)), prompt(12)
    model.compile(backend=river, options=TWINS)
    options = {"custom_generate": exact, "cache_implementation": "static", "disable_compile": True, **CONSTANT}
    text = generate(model, ids, use_mtp=True, **options)
    assert torch.equal(text, generate(plain("glm4_moe", 1, SOME_RIGHT), ids))
    proposed = {**ours}
    ours.clear()
    generate(accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True, **CONSTANT), ids)
    assert proposed == ours != {}


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["auto", OPERATORS], ids=["captured", "operators"])
def test_passes_keep_the_last_hidden_states(monkeypatch, kernels):
    """Those that transformers returns, but before the final norm; also where a capture ends in the head."""
    captured = []
    monkeypatch.setattr(CaptureLog, "add", lambda self, record: captured.append(record.unit))
    model, theirs = (make("llama", layers=2) for _ in range(2))
    river_compile.accelerate(model, **{**ALONE, "kernels": kernels})
    found = []
    take = Passes.take_hidden

    def taking(self):
        hidden = take(self)
        if hidden is not None:
            found.append(model.model.norm(hidden))
        return hidden

    ids = prompt(40)
    monkeypatch.setattr(Passes, "take_hidden", taking)
    passes = passes_of(model, ids)
    Prompt(passes, ids[:, :30], GenerationConfig()).run()
    assert passes.take_hidden() is not None
    passes.widths = (1, 2, 4)
    for place in (31, 34, 35, 38, 40):  # the last ids of passes of 1, 3, 1, 3 and 2 tokens, each run twice
        for _ in range(2):
            width = place - passes.kv.filled
            passes.verify(ids[:, :place], width - 1)
            assert passes.take_hidden() is not None
            passes.rewind(passes.width_for(width - 1))
        passes.kv.rewind(-width)
    hidden = theirs(ids, output_hidden_states=True).hidden_states[-1]
    ends = [(0, 30), *[pair for pair in ((30, 31), (31, 34), (34, 35), (35, 38), (38, 40)) for _ in range(2)]]
    for ours, (first, end) in zip(found, ends, strict=True):
        other = hidden[:, first:end]
        torch.testing.assert_close(ours[:, : other.shape[1]], other, rtol=1e-3, atol=1e-3)
    assert any("last" in unit for unit in captured) == (kernels == "auto")


def passes_of(model, ids):
    """Returns passes that keep hidden states."""
    state = model_state(model, find_record(model).find(ProgramCache).config)
    kwargs = {"attention_mask": torch.ones_like(ids[:, :30]), "use_cache": True}
    return Passes(model, kwargs, KVCache.of(model, 64), WHOLE, state, keeps_hidden=True)


@pytest.mark.slow
def test_a_freed_model_frees_its_layers(folder):
    """They share its embedding and head while a text is drafted, and hold neither afterwards."""
    model = river_compile.accelerate(load(folder("glm4_moe", 1, SOME_RIGHT)), use_mtp=True, **ALONE)
    generate(model, prompt(12))
    seen = weakref.ref(model.get_input_embeddings().weight)
    layers = weakref.ref(find_record(model).of(mtp._Loaded).layers)
    assert layers() is not None
    del model
    gc.collect()
    assert seen() is None
    assert layers() is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda folder: make("llama", layers=1), "names no MTP layers"),
        (lambda folder: make("deepseek_v3", layers=1), "was not loaded from a checkpoint"),
        (lambda folder: load(folder("glm4_moe", 1, mtp_weights=False)), "MTP layers cannot be loaded from"),
    ],
    ids=["no layers", "no checkpoint", "no weights"],
)
def test_models_without_layers_are_named(folder, model, message):
    """By `accelerate` with an error; a call runs in transformers, which raises its own, with one warning."""
    model = model(folder)
    with pytest.raises(OptionError, match=message):
        river_compile.accelerate(model, use_mtp=True, **ALONE)
    river_compile.accelerate(model, **ALONE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(Exception, match=r"mtp|MTP|Mtp|not a (valid|local)|safetensors|num_mtp_layers|Repo id"):
                generate(model, prompt(12), use_mtp=True)
    (warning,) = [w for w in said if issubclass(w.category, RiverWarning)]
    assert message in str(warning.message)
    assert "use_mtp=True is not available" in str(warning.message)


def test_a_release_without_mtp_layers_is_named(monkeypatch, plain):
    monkeypatch.setattr(upstream, "_Model", None)
    assert "has no MTP layers. Update transformers" in upstream.why_no_mtp(plain("glm4_moe", 1, SOME_RIGHT))


def test_early_exits_take_no_layers(folder):
    model = load(folder("glm4_moe", 1, SOME_RIGHT))
    with pytest.raises(OptionError, match="use_mtp=True requires quality='exact'"):
        river_compile.accelerate(model, "fast", use_mtp=True, **ALONE)
    with pytest.raises(OptionError, match="use_mtp"):
        river_compile.accelerate(model, use_mtp="yes", **ALONE)


def test_copies_of_a_model_have_no_layers(accelerated, tmp_path):
    model = accelerated("glm4_moe", 1, SOME_RIGHT, use_mtp=True)
    generate(model, prompt(12))
    names = [*model.state_dict()]
    model.save_pretrained(tmp_path)
    assert [*AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()] == names
