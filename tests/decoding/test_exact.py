"""Exact mode on real transformers models: the text, the outputs and the cache are those of the plain model.

The models are tiny and run with the eager lowering, whose backbone gives the plain model's bits. Graphs are nearly all
of the time, so models have two blocks, drafts at most three tokens, and tests that change nothing of a model share it.
"""

import functools
import itertools
import re
from collections import Counter

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile.backend import river
from river_compile.decoding.draft_length import DraftLengths
from river_compile.decoding.kv_cache import slots_for
from river_compile.decoding.mode import decode, exact
from river_compile.decoding.passes import Passes
from river_compile.errors import ExactModeError
from river_compile.exits import forced_depth
from river_compile.record import record_of
from river_compile.upstream.transformers import cache_argument, cache_of
from tests.support.decoding import new_cache
from tests.support.families import CONFIGS, REWRITTEN, each, prompt
from tests.support.families import make as make_family
from tests.support.layout import ROOT, run_python
from tests.support.lowerings import OPERATORS
from tools.families.tiny import tiny_model

NEW_TOKENS = 24
LAYERS = 2
MAX_DRAFT = 3
OPTIONS = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"}  # drafts need not be good
BY_DEFAULT = ("llama", "gemma3", "mixtral")  # full attention, windows among it, experts
SLIDING = ("mistral", "ministral", "gemma2", "gemma3")


def make(name, dtype=torch.float32):
    return make_family(name, dtype, layers=LAYERS)


def compiled(name="llama", dtype=torch.float32, **options):
    model = make(name, dtype)
    model.compile(backend=river, options={**OPTIONS, **options})
    return model


@pytest.fixture(scope="module")
def shared():
    """Returns the one compiled model of a family that is for tests which change nothing of it."""
    of_family = functools.cache(compiled)
    with torch._dynamo.config.patch(recompile_limit=64):
        yield lambda name="llama": of_family(name)


def padded_row(length=12):
    """Returns ids and mask of one row that begins with padding."""
    ids, mask = padded(2, length)
    return ids[:1], mask[:1]


def padded(batch, length=12):
    """Returns ids and mask; the first rows begin with padding."""
    ids, mask = prompt(length, batch), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch - 1):
        mask[row, : length // 2 - row] = 0
    return ids.masked_fill(mask == 0, 0), mask


def positions(mask):
    """Returns position ids as transformers numbers left-padded rows."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generate(model, ids, mask=None, static=True, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    cache = {"cache_implementation": "static"} if static and not cache_of(options) else {}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **cache, **options}
    return model.generate(ids, attention_mask=mask, **options)


def exactly(model, ids, mask=None, **options):
    return generate(
        model,
        ids,
        mask,
        custom_generate=exact,
        **{"num_assistant_tokens": MAX_DRAFT, "num_assistant_tokens_schedule": "constant", **options},
    )


@pytest.mark.parametrize("name", each(REWRITTEN, BY_DEFAULT))
def test_every_family_generates_the_plain_text_with_a_static_cache(name, shared):
    """With left padding and prompt lookup."""
    model, (ids, mask) = shared(name), padded_row()
    with river_compile.trace() as trace:
        text = exactly(model, ids, mask)
    assert torch.equal(text, generate(make(name), ids, mask))
    assert {step.depth for step in trace.tokens} >= {0}
    assert len(trace.cycles) < NEW_TOKENS - 1


@pytest.mark.parametrize("name", each(["llama", "gemma3"], ["llama"]))
def test_a_batch_has_the_plain_text_and_its_last_row_drafts(name, shared):
    """One of three is left in the end; where the caller gets the cache back, all stay."""
    (ids, mask), plain, model = padded(3), make(name), shared(name)
    exactly(model, ids[:1], mask[:1], max_new_tokens=4)
    first, second, third = generate(plain, ids, mask)[:, ids.shape[1] :].tolist()
    options = {"eos_token_id": sorted({*first, *second} - {*third}), "pad_token_id": 0}
    expected = generate(plain, ids, mask, **options)
    for shared_cache in (False, True):
        with river_compile.trace() as trace:
            text = exactly(model, ids, mask, return_dict_in_generate=shared_cache, **options)
        assert torch.equal(text.sequences if shared_cache else text, expected)
        assert bool(trace.cycles) == (not shared_cache)


@pytest.mark.slow
def test_prompts_of_one_token_run_through_the_backbone():
    """Their graph is a decode step's, and tokens that may exit would exit immediately."""
    model, ids = compiled(threshold=-1.0, first_exit=1), prompt(1)
    with river_compile.trace() as trace:
        assert torch.equal(exactly(model, ids), generate(make("llama"), ids))
    assert trace.tokens[0].depth == LAYERS


@pytest.mark.slow
def test_outputs_and_the_cache_are_the_plain_ones(shared):
    """Scores and logits per token, and the cache: its length and every filled slot."""
    ids, mask = padded_row()
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = generate(make("llama"), ids, mask, repetition_penalty=1.3, **options)
    ours = exactly(shared(), ids, mask, repetition_penalty=1.3, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(ours, name)) == NEW_TOKENS
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), atol=1e-4, rtol=1e-4)
    filled = int(cache_of(plain).get_seq_length())
    assert filled == ids.shape[1] + NEW_TOKENS - 1
    for layer, expected in zip(cache_of(ours).layers, cache_of(plain).layers, strict=True):
        assert layer.cumulative_length == expected.cumulative_length
        torch.testing.assert_close(layer.keys[:, :, :filled], expected.keys[:, :, :filled], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values[:, :, :filled], expected.values[:, :, :filled], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_texts_end_inside_drafts(batch, shared):
    """For every token of a plain text as the end-of-sequence token: the same text, rows padded after their ends."""
    ids, mask = padded(batch)
    plain, model = make("llama"), shared()
    for token in generate(plain, ids, mask)[0, ids.shape[1] :].unique().tolist():
        expected = generate(plain, ids, mask, eos_token_id=token)
        assert torch.equal(exactly(model, ids, mask, eos_token_id=token), expected)


class Seen(LogitsProcessor, BaseStreamer):
    """A logits processor with a memory (it forbids what it has seen a third time), and a streamer."""

    def __init__(self):
        self.lengths, self.put_ids, self.ended = [], [], 0

    def __call__(self, ids, scores):
        self.lengths.append((len(ids), ids.shape[1]))
        scores = scores.clone()
        for token in ids[0].unique():
            if (ids[0] == token).sum() > 1:
                scores[0, token] = -torch.inf
        return scores

    def put(self, value):
        self.put_ids += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("gpt_oss", 1), *each([("llama", 2), ("gemma3", 1)], [])])
def test_strict_text_has_the_bits_of_decoding_without_drafts(name, batch, dtype):
    """On River's own kernels: ids, logits and cache. (Several rows do not draft.) gpt-oss has sinks and windows."""
    ids, mask = padded_row(length=7) if batch == 1 else padded(batch, length=7)
    model = compiled(name, dtype=dtype, kernels="native", first_exit=1)
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    with river_compile.trace() as trace:
        ours = exactly(model, ids, mask, strict=True, **options)
    with forced_depth(model.config.num_hidden_layers):
        plain = generate(model, ids, mask, custom_generate=decode, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits))
    for layer, expected in zip(cache_of(ours).layers, cache_of(plain).layers, strict=True):
        filled = expected.get_seq_length()
        assert torch.equal(layer.keys[:, :, :filled], expected.keys[:, :, :filled])
        assert torch.equal(layer.values[:, :, :filled], expected.values[:, :, :filled])
    assert any(cycle.width > 1 for cycle in trace.cycles) == (batch == 1)


@pytest.mark.parametrize("options", [{}, {"kernels": "native", "target_kernels": "model"}])
def test_what_strict_cannot_keep_is_an_error(options):
    reason = "Cannot guarantee strict=True for this LlamaForCausalLM: .*not River's own"
    with pytest.raises(ExactModeError, match=reason):
        exactly(compiled(**options), prompt(), strict=True)


def test_strict_names_a_weight_that_the_models_operator_multiplies():
    """GPT-2 stores its matrices the other way around. A library sums them differently for one row and for several."""
    reason = r"for this GPT2LMHeadModel: transformer\.h\.0\.attn\.c_attn\.weight is multiplied by the model's operator"
    with pytest.raises(ExactModeError, match=reason):
        exactly(compiled("gpt2", dtype=torch.bfloat16, kernels="native"), prompt(), strict=True)


def test_strict_names_attention_that_the_models_operators_compute():
    """DeepSeek's has latent keys and values, which the C++ kernels lack."""
    with pytest.raises(ExactModeError, match=r"for this DeepseekV3ForCausalLM: attention of block_1 is the model's"):
        exactly(compiled("deepseek_v3", dtype=torch.bfloat16, kernels="native"), prompt(), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("drafted_at_once", [2, 5])
def test_after_each_cycle_the_cache_holds_what_passes_of_that_width_write(drafted_at_once, monkeypatch):
    """The plain model runs the same ids in the same widths: the same slots, lengths and bits, cycle by cycle."""
    ids, mask = padded_row()
    plain = make("llama")
    plain.compile(backend="eager")  # as ours is: transformers groups the heads of one query only in eager mode
    cache = new_cache(plain, "static", capacity=64)
    held = {cache_argument(plain): cache, "use_cache": True}
    plain(ids, attention_mask=mask, position_ids=positions(mask), **held)
    cycles, judged = [], []

    def verify(runner, ids_BS, drafted):
        logits = run_verify(runner, ids_BS, drafted)
        cycles.append((ids_BS.clone(), drafted, runner.width_for(drafted), logits))
        return logits

    def rewind(runner, freed):
        run_rewind(runner, freed)
        if len(cycles) == len(judged):  # (the drafts' entries)
            return
        text, drafted, width, logits = cycles[-1]
        judged.append(width - freed)
        filler = text[:, -1:].expand(-1, width - drafted - 1)
        text = torch.cat([text, filler], 1)
        start = text.shape[1] - width
        whole = torch.cat([mask, torch.ones(1, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        expected = plain(text[:, start:], attention_mask=whole, position_ids=positions(whole)[:, start:], **held)
        assert torch.equal(logits, expected.logits[:, : drafted + 1])
        torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], freed)
        for layer, ours in zip(cache.layers, runner.kv.cache.layers, strict=True):
            filled = int(layer.get_seq_length())
            assert filled == int(ours.get_seq_length()) == start + width - freed
            assert torch.equal(layer.keys[:, :, :filled], ours.keys[:, :, :filled])
            assert torch.equal(layer.values[:, :, :filled], ours.values[:, :, :filled])

    run_verify, run_rewind = Passes.verify, Passes.rewind
    monkeypatch.setattr(Passes, "verify", verify)
    monkeypatch.setattr(Passes, "rewind", rewind)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):  # (of both models together)
        exactly(compiled(), ids, mask, num_assistant_tokens=drafted_at_once)
    assert len(judged) == len(cycles) > 1


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 3])
def test_processors_and_streamers_see_what_plain_generation_shows_them(batch, shared):
    """Call by call, in a batch too."""
    ids, mask = padded(batch)
    plain, ours = Seen(), Seen()
    expected = generate(make("llama"), ids, mask, logits_processor=LogitsProcessorList([plain]), streamer=plain)
    text = exactly(shared(), ids, mask, logits_processor=LogitsProcessorList([ours]), streamer=ours)
    assert torch.equal(text, expected)
    assert (ours.lengths, ours.put_ids, ours.ended) == (plain.lengths, plain.put_ids, 1)


@pytest.mark.slow
def test_nothing_is_compiled_after_a_warm_up(fresh_dynamo):
    """After two texts, prompts of other lengths and any draft length run in the same graphs."""
    model = compiled()
    for length in (9, 14):
        exactly(model, prompt(length))
        exactly(model, prompt(length), prompt_lookup_num_tokens=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length, drafted in itertools.product((8, 11, 23), (1, 3)):
            exactly(model, prompt(length), num_assistant_tokens=drafted)


def test_the_report_counts_cycles():
    model = compiled()
    with river_compile.trace() as trace:
        exactly(model, prompt(12))
    report = river_compile.report(model)
    drafted = Counter(source for cycle in trace.cycles for source in cycle.drafted)
    assert report.to_dict()["exact"] == {
        "cycles": len(trace.cycles),
        "drafted": drafted.total(),
        "accepted": sum(cycle.accepted for cycle in trace.cycles),
        "kept": NEW_TOKENS - 1,
        "by_source": {source: (count, trace.kept_sources.get(source, 0)) for source, count in drafted.items()},
    }
    assert f"{len(trace.cycles)} verifying passes" in str(report)


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 2])
def test_sampled_text_is_plain_samplings_for_the_same_seed(batch, shared):
    """One text, or two for each of two prompts; and PyTorch's generator continues from the same place.

    A processor that holds a number for each row, as a repetition penalty does, is given the last row alone.
    """
    ids, mask = padded(batch)
    options = {
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 0.9,
        "num_return_sequences": batch,
        "repetition_penalty": 1.2,
    }
    texts, next_numbers = [], []
    for model, run in ((make("llama"), generate), (shared(), exactly)):
        torch.manual_seed(3)
        texts.append(run(model, ids, mask, **options))
        next_numbers.append(torch.rand(3).tolist())
    assert torch.equal(*texts)
    assert next_numbers[0] == next_numbers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"use_cache": False, "static": False}, "use_cache=False"),
        ({"past_key_values": DynamicCache(), "static": False}, "past_key_values=DynamicCache is not available"),
        ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ({"num_assistant_tokens": -1}, "num_assistant_tokens=-1"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens=-1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, message, shared):
    with pytest.raises(ValueError, match=message):
        exactly(shared(), prompt(), **options)


def test_a_model_that_reads_the_whole_text_in_every_pass_is_refused():
    """CPM-Ant's positions attend to those that follow, so a pass of several tokens gives others than several passes."""
    model = tiny_model("cpmant")
    model.compile(backend=river, options={"kernels": OPERATORS, "group_size": 32})
    with pytest.raises(ValueError, match="CpmAntForCausalLM takes the whole text in every pass"):
        exactly(model, prompt(), static=False)


@pytest.fixture
def order(monkeypatch):
    """Passes are taken to return before they have run; returns what they are in order, and when the host reads."""
    noted, calls = (
        [],
        ((Passes, "draft_step", "draft"), (Passes, "verify", "verify"), (torch.Tensor, "tolist", "read")),
    )
    for owner, name, what in calls:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _real=real, _what=what: noted.append(_what) or _real(*a))
    monkeypatch.setattr(Passes, "runs_late", True)
    return noted


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_a_late_draft_is_queued_as_a_whole_and_read_once(order, shared, sample, lookup):
    """And its verification a single time if no streamer reads the text on the way; a text ends within a draft."""
    model, (ids, mask) = shared(), padded_row()
    torch.manual_seed(5)
    text = generate(make("llama"), ids, mask, do_sample=sample)[0, ids.shape[1] :].tolist()
    options = {"do_sample": sample, "eos_token_id": max(text, key=text.index), "pad_token_id": 0}
    torch.manual_seed(5)
    expected = generate(make("llama"), ids, mask, **options)
    torch.manual_seed(5)
    order.clear()
    with river_compile.trace() as trace:
        assert torch.equal(
            exactly(model, ids, mask, prompt_lookup_num_tokens=None if lookup else 0, **options), expected
        )
    assert sum(cycle.accepted for cycle in trace.cycles) > 0
    cycles = "".join(what[0] for what in order[order.index("draft") :])
    reads = "" if sample else "r"  # (samples are read one by one, each as an item)
    assert re.fullmatch(f"((d+r)?v{reads})+", cycles), cycles
    assert cycles.count("v") == len(trace.cycles)


#: Counts what the host waits for in cycles whose kinds of passes all ran before, on a card that is not there.
WAITS = """
from unittest import mock
from tools.rehearsal import card
card.install()
import torch
import river_compile
from river_compile.backend import river
from river_compile.decoding import batch
from tests.decoding.test_exact import OPTIONS, exactly, generate, make
from tests.support.families import prompt
from tests.support.lowerings import operators_on

refuse, run, speculate, waits, counts = card._refuse, card.Clock.run, batch.speculate, [], []

def refusing(what):  # (it is asked by all that no capture allows; an event behind what was read is no wait)
    waits.extend([what] if what.startswith("a copy") else [])
    refuse(what)

def running(name, work):
    waits.extend([name] if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero") else [])
    return run(name, work)

def counting(*args):
    waits.clear()
    for _ in speculate(*args):
        counts.append(len(waits))
        waits.clear()

ids = prompt(12)
model = make("llama").to("cuda")
model.compile(backend=river, options={**OPTIONS, "kernels": operators_on("cuda"), "graphs": True})
options = {"prompt_lookup_num_tokens": 0, "max_new_tokens": 30}
exactly(model, ids.cuda(), **options)
with mock.patch.multiple(card, _refuse=refusing), mock.patch.object(card.Clock, "run", running):
    with mock.patch.object(batch, "speculate", counting):
        with river_compile.trace() as trace:
            text = exactly(model, ids.cuda(), **options)
assert torch.equal(text.cpu(), generate(make("llama"), ids, max_new_tokens=30))
assert 0 < sum(cycle.accepted for cycle in trace.cycles) < sum(len(cycle.drafted) for cycle in trace.cycles)
assert any(graph.captures.made for graph in river_compile.report(model).graphs)
# (The inputs of the first two passes of a width are transformers', which waits.)
assert len(counts) > 5 and set(counts[2:-3]) == {2}, counts
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has a card of its own")
def test_a_cycle_on_a_card_waits_for_its_draft_and_for_its_verification():
    run_python(WAITS, ROOT, ROOT)


def test_models_that_have_no_two_paths_are_refused():
    with pytest.raises(ValueError, match="never reached"):
        exactly(make("llama"), prompt())
    with pytest.raises(ValueError, match=r"Full depth is not available: .* exit_depth=1"):
        exactly(compiled(exit_depth=1), prompt(1))
    for option, message in (({"prefill": "exit"}, "prefill='exit'"), ({"exit_depth": 1}, "exit_depth=1")):
        with pytest.raises(ValueError, match=message):
            exactly(compiled(**option), prompt())


def test_adaptive_calls_go_on_with_what_earlier_ones_learned(shared):
    """By greedy and sampled texts; where drafts are to be the same in every run, each call starts from nothing."""
    model, ids = shared(), prompt(12)
    learned = record_of(model.parameters()).of(DraftLengths)
    exactly(model, ids, max_new_tokens=8)
    assert not learned
    exactly(model, ids, max_new_tokens=8, num_assistant_tokens_schedule=None)
    length = learned[False, 0]
    exactly(model, ids, max_new_tokens=8, num_assistant_tokens_schedule=None)
    assert learned[False, 0] is length
    exactly(model, ids, max_new_tokens=8, num_assistant_tokens_schedule=None, do_sample=True)
    assert set(learned) == {(False, 0), (True, 0)}


@pytest.mark.parametrize(("name", "slots"), [("gpt2", 40), ("opt", 40), ("llama", 256)])
def test_a_cache_has_no_more_slots_than_the_model_has_embeddings_of_positions(name, slots):
    """Each slot is a position that the padding of a verifying pass may read. Llama computes its positions."""
    config = CONFIGS[name](2)
    config.max_position_embeddings = 40
    assert slots_for(make_family(name, config=config), 30) == slots
