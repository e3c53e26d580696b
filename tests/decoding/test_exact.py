"""Exact mode on real transformers models: the text, the outputs and the cache are those of the plain model.

The models are tiny and run with the eager lowering, whose backbone gives the plain model's bits. Graphs are nearly all
of the time, so models have two blocks, drafts at most three tokens, and tests that change nothing of a model share it.
"""

import copy
import functools
import itertools
import re
from collections import Counter

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile.api.generation import generate_exactly
from river_compile.decoding.session import Session
from river_compile.errors import ExactModeError
from river_compile.exits import forced_depth
from river_compile.model_record import record_of
from river_compile.upstream.transformers import cache_argument, cache_of, crop
from tests.support.decoding import Halved, new_cache
from tests.support.families import REWRITTEN, each, prompt
from tests.support.families import make as make_family
from tests.support.layout import ROOT, run_python
from tools.families.tiny import tiny_model

NEW_TOKENS = 24
LAYERS = 2
MAX_DRAFT = 3
OPTIONS = {"lowering": "eager", "group_size": 32, "quantizer": "rtn"}  # drafts need not be good
BY_DEFAULT = ("llama", "gemma3", "mixtral")  # full attention, windows among it, experts
SLIDING = ("mistral", "ministral", "gemma2", "gemma3")


def make(name, dtype=torch.float32):
    return make_family(name, dtype, layers=LAYERS)


def compiled(name="llama", dtype=torch.float32, **options):
    model = make(name, dtype)
    model.compile(backend=river_compile.river, options={**OPTIONS, **options})
    return model


@pytest.fixture(scope="module")
def shared():
    """Returns the one compiled model of a family that is for tests which change nothing of it."""
    of_family = functools.cache(compiled)
    with torch._dynamo.config.patch(recompile_limit=64):
        yield lambda name="llama": of_family(name)


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
        model, ids, mask, custom_generate=river_compile.exact, **{"max_draft": MAX_DRAFT, "adaptive": False, **options}
    )


@pytest.mark.parametrize(
    ("name", "batch"),
    [*each([(name, 3) for name in REWRITTEN], BY_DEFAULT), *each([("llama", 1), ("gemma3", 1)], ["llama"])],
)
def test_every_family_generates_the_plain_text_with_a_static_cache(name, batch, shared):
    """A batch of three with left padding and prompt lookup; one row without lookup."""
    model, (ids, mask) = shared(name), padded(batch)
    with river_compile.trace() as trace:
        text = exactly(model, ids, mask, prompt_lookup=batch > 1)
    assert torch.equal(text, generate(make(name), ids, mask))
    assert {step.depth for step in trace.tokens} >= {0}
    assert len(trace.cycles) < NEW_TOKENS - 1 or batch > 1
    assert not any(cycle.held_back for cycle in trace.cycles), "rows waited for each other"


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "batch"),
    each([("llama", 1), *((name, 3) for name in ("llama", "gpt2", *SLIDING))], BY_DEFAULT),
)
def test_growing_caches_and_sliding_windows_give_the_plain_text(name, batch, shared):
    """The texts are longer than the sliding windows, and windows are rewound across their edge."""
    ids, mask = padded(batch)
    expected = generate(make(name), ids, mask, static=False)
    assert torch.equal(exactly(shared(name), ids, mask, static=False), expected)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.slow
def test_prompts_of_one_token_run_through_the_backbone(static):
    """Their graph is a decode step's, and tokens that may leave would leave at once."""
    model, ids = compiled(threshold=-1.0, first_exit=1), prompt(1, 3)
    with river_compile.trace() as trace:
        assert torch.equal(exactly(model, ids, static=static), generate(make("llama"), ids, static=static))
    assert trace.tokens[0].depth == LAYERS


@pytest.mark.core
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.slow
def test_static_sliding_windows_are_rewound_before_and_after_they_are_full(name, shared):
    """A prompt shorter than the window: the text, and what the windows hold in the end, are the plain ones."""
    options = {"return_dict_in_generate": True}
    plain, ours = generate(make(name), prompt(3), **options), exactly(shared(name), prompt(3), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for layer, expected in zip(cache_of(ours).layers, cache_of(plain).layers, strict=True):
        filled = min(int(expected.get_seq_length()), expected.max_cache_len)
        assert int(layer.get_seq_length()) == int(expected.get_seq_length())
        assert layer.cumulative_length == expected.cumulative_length
        torch.testing.assert_close(layer.keys[:, :, :filled], expected.keys[:, :, :filled], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values[:, :, :filled], expected.values[:, :, :filled], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_outputs_and_the_cache_are_the_plain_ones(shared):
    """Scores and logits per token, and the cache: its length and every filled slot."""
    ids, mask = padded(3)
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


@pytest.mark.core
def test_the_cache_can_go_on_in_plain_generation(shared):
    """Of a batch: rows of a cache that was given stay where plain generation has them."""
    model, (ids, mask) = shared(), padded(3)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW_TOKENS - 1)
    text = exactly(model, ids, mask, **{cache_argument(model): cache}, max_new_tokens=NEW_TOKENS - 8)
    whole = torch.cat([mask, mask.new_ones(3, NEW_TOKENS - 8)], dim=1)
    with forced_depth(model.config.num_hidden_layers):
        more = generate(model, text, whole, **{cache_argument(model): cache}, max_new_tokens=8)
    assert torch.equal(more, generate(make("llama"), ids, mask))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.slow
def test_a_conversation_goes_on_with_the_cache_of_its_last_turn(kind, shared):
    """Two turns in exact mode on one cache give the text of one plain generation from the whole conversation.

    Two second turns, each on a copy of what the first one left: a beginning that several requests share runs once.
    """
    model, plain, ids = shared(), make("llama"), prompt()
    cache = new_cache(model, kind, capacity=64)
    first = exactly(model, ids, max_new_tokens=10, **{cache_argument(model): cache})
    for seed in (2, 3):
        held = copy.deepcopy(cache)
        whole = torch.cat([first, prompt(5, seed=seed)], dim=1)
        second = exactly(model, whole, max_new_tokens=10, **{cache_argument(model): held})
        assert torch.equal(second, generate(plain, whole, max_new_tokens=10))
        assert int(held.get_seq_length()) == second.shape[1] - 1


@pytest.mark.slow
def test_a_quantized_cache_is_refused_by_name():
    """Nothing could be taken back from what was quantized together. An accelerated model goes on without drafts."""
    model, ids = compiled(), prompt()

    def held():
        return {cache_argument(model): Cache(layers=[Halved(residual_length=4) for _ in range(LAYERS)])}

    with pytest.raises(ValueError, match=r"this cache cannot give entries back \(Halved\)"):
        exactly(model, ids, **held())
    generate_exactly(model, river_compile.exact, river_compile.RiverConfig())
    with pytest.warns(river_compile.RiverWarning, match=r"cannot give entries back \(Halved\)"):
        ours = generate(model, ids, **held())
    assert torch.equal(ours, generate(make("llama"), ids, **held()))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_strict_text_has_the_bits_of_decoding_without_drafts(name, dtype):
    """On River's own kernels: ids, logits and cache, of rows that keep what held for each of them."""
    ids, mask = padded(2, length=7)
    model = compiled(name, dtype=dtype, lowering="native", first_exit=1)
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    with river_compile.trace() as trace:
        ours = exactly(model, ids, mask, strict=True, **options)
    with forced_depth(model.config.num_hidden_layers):
        plain = generate(model, ids, mask, custom_generate=river_compile.decode, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits))
    for layer, expected in zip(cache_of(ours).layers, cache_of(plain).layers, strict=True):
        filled = expected.get_seq_length()
        assert torch.equal(layer.keys[:, :, :filled], expected.keys[:, :, :filled])
        assert torch.equal(layer.values[:, :, :filled], expected.values[:, :, :filled])
    assert any(cycle.width > 1 for cycle in trace.cycles) == (name == "llama")  # (Gemma's windows are full)


@pytest.mark.parametrize(
    ("options", "static", "reason"),
    [
        ({}, True, "not River's own"),
        ({"lowering": "native", "backbone": "model"}, True, "not River's own"),
        ({"lowering": "native"}, False, "its KV cache grows"),
    ],
)
def test_what_strict_cannot_keep_is_an_error(options, static, reason):
    with pytest.raises(ExactModeError, match=f"strict=True cannot be kept for this LlamaForCausalLM: .*{reason}"):
        exactly(compiled(**options), prompt(), static=static, strict=True)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.slow
def test_after_each_cycle_the_cache_holds_what_passes_of_that_width_write(static, monkeypatch):
    """The plain model runs the same ids in the same widths: the same slots, lengths and bits, cycle by cycle."""
    ids, mask = padded(3)
    plain = make("llama")
    plain.compile(
        backend="eager"
    )  # traced, as ours is: transformers groups the heads of one query only where it is not
    cache = new_cache(plain, "static" if static else "dynamic", capacity=ids.shape[1] + NEW_TOKENS - 1)
    held = {cache_argument(plain): cache, "use_cache": True}
    plain(ids, attention_mask=mask, position_ids=positions(mask), **held)
    cycles = []

    def verify(runner, ids_BS, drafted):
        logits = run_verify(runner, ids_BS, drafted)
        cycles.append((ids_BS, drafted, runner.width_for(drafted), logits))
        return logits

    def keep(runner, kept, tokens):
        run_keep(runner, kept, tokens)
        text, drafted, width, logits = cycles[-1]
        filler = text[:, -1:].expand(-1, width - drafted - 1)
        text = torch.cat([text, filler], 1)
        start = text.shape[1] - width
        whole = torch.cat([mask, torch.ones(3, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        expected = plain(text[:, start:], attention_mask=whole, position_ids=positions(whole)[:, start:], **held)
        assert torch.equal(logits, expected.logits[:, : drafted + 1])
        crop(cache, width - tokens)
        for layer, ours in zip(cache.layers, runner.cache.layers, strict=True):
            filled = int(layer.get_seq_length())
            assert filled == int(ours.get_seq_length()) == start + tokens
            assert torch.equal(layer.keys[:, :, :filled], ours.keys[:, :, :filled])
            assert torch.equal(layer.values[:, :, :filled], ours.values[:, :, :filled])

    run_verify, run_keep = Session.verify, Session.keep
    monkeypatch.setattr(Session, "verify", verify)
    monkeypatch.setattr(Session, "keep", keep)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):  # (of both models together)
        # (A cache that is handed back has the rows where plain generation has them.)
        exactly(compiled(), ids, mask, static=static, max_draft=5, return_dict_in_generate=True)
    assert len({width for _, _, width, _ in cycles}) > 1


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 3])
def test_processors_and_streamers_see_what_plain_generation_shows_them(batch, shared):
    """Call by call, in a batch too: rows wait for each other where a processor may look at all of them."""
    ids, mask = padded(batch)
    plain, ours = Seen(), Seen()
    expected = generate(make("llama"), ids, mask, logits_processor=LogitsProcessorList([plain]), streamer=plain)
    text = exactly(shared(), ids, mask, logits_processor=LogitsProcessorList([ours]), streamer=ours)
    assert torch.equal(text, expected)
    assert (ours.lengths, ours.put_ids, ours.ended) == (plain.lengths, plain.put_ids, 1)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.slow
def test_nothing_is_compiled_after_a_warm_up(static, fresh_dynamo):
    """After two texts, prompts of other lengths, full caches and any draft length run in the same graphs."""
    model = compiled()
    model._previous_max_cache_length = 64
    for length in (9, 14):
        exactly(model, prompt(length), static=static)
        exactly(model, prompt(length), static=static, prompt_lookup=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length, drafted in itertools.product((8, 11, 23), (1, 3)):
            exactly(model, prompt(length), static=static, max_draft=drafted)


def test_the_report_tells_what_a_batch_cost():
    """With outputs that hold all rows, so that they wait for each other."""
    ids, mask = padded(3)
    model = compiled()
    with river_compile.trace() as trace:
        exactly(model, ids, mask, return_dict_in_generate=True)
    report = river_compile.report(model)
    held_back = sum(cycle.held_back for cycle in trace.cycles)
    assert held_back > 0
    drafted = Counter(source for cycle in trace.cycles for source in cycle.drafted)
    assert report.to_dict()["exact"] == {
        "cycles": len(trace.cycles),
        "row_cycles": 3 * len(trace.cycles),
        "drafted": drafted.total(),
        "accepted": sum(cycle.accepted for cycle in trace.cycles),
        "kept": 3 * (NEW_TOKENS - 1),
        "held_back": held_back,
        "by_source": {source: (count, trace.kept_sources.get(source, 0)) for source, count in drafted.items()},
    }
    assert f"{len(trace.cycles)} verifying passes" in str(report)
    assert "the slowest row decided" in str(report)


@pytest.mark.core
@pytest.mark.parametrize(("name", "static"), [("llama", True), ("llama", False), ("gemma3", True)])
@pytest.mark.slow
def test_each_row_of_a_batch_has_its_text_and_takes_no_more_passes_than_alone(name, static, shared):
    """Rows part: across the edges of windows, in a cache with no slot to spare, until the last one has ended."""
    ids, mask = padded(3)
    model, options = shared(name), {"static": static}
    passes = []
    for row in range(3):
        with river_compile.trace() as trace:
            text = exactly(model, ids[row : row + 1], mask[row : row + 1], **options)
        passes.append((len(trace.cycles), text[0].tolist()))
    with river_compile.trace() as trace:
        texts = exactly(model, ids, mask, **options)
    assert texts.tolist() == [text for _, text in passes]
    assert len(trace.cycles) <= max(count for count, _ in passes) + 2  # (where the cache ends, passes are narrow)
    if name == "llama":  # (the other's drafts hold alike in all rows)
        assert len({tuple(row.row for row in cycle.rows) for cycle in trace.cycles}) > 1, "all rows ended together"


@pytest.mark.core
def test_sampled_text_is_plain_samplings_for_the_same_seed(shared):
    """Two texts for each of two prompts that part, and PyTorch's generator goes on from the same place.

    A processor that holds a number for each row, as a repetition penalty does, is given some of the rows at a time.
    """
    ids, mask = padded(2)
    options = {
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 0.9,
        "num_return_sequences": 2,
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
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"use_cache": False, "static": False}, "use_cache=False"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ({"max_draft": 0}, "max_draft=0"),
        ({"prompt_lookup": "yes"}, "prompt_lookup='yes'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, message, shared):
    with pytest.raises(ValueError, match=message):
        exactly(shared(), prompt(), **options)


@pytest.mark.core
def test_an_assistant_model_is_refused_by_name(shared):
    """transformers gives a callable custom_generate no assistant, so it would be ignored without a word."""
    with pytest.raises(ValueError, match="assistant_model=LlamaForCausalLM is not available"):
        exactly(shared(), prompt(), assistant_model=make("llama"))


def test_a_model_that_reads_the_whole_text_in_every_pass_is_refused():
    """CPM-Ant's positions attend to those that follow, so a pass of several tokens gives others than several passes."""
    model = tiny_model("cpmant")
    model.compile(backend=river_compile.river, options={"lowering": "eager", "group_size": 32})
    with pytest.raises(ValueError, match="CpmAntForCausalLM takes the whole text in every pass"):
        exactly(model, prompt(), static=False)


@pytest.fixture
def order(monkeypatch):
    """Passes are taken to return before they have run; returns what they are in order, and when the host reads."""
    noted, calls = (
        [],
        ((Session, "draft_step", "draft"), (Session, "verify", "verify"), (torch.Tensor, "tolist", "read")),
    )
    for owner, name, what in calls:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _real=real, _what=what: noted.append(_what) or _real(*a))
    monkeypatch.setattr(Session, "runs_late", True)
    return noted


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize(("batch", "sample"), [(1, False), (3, False), (3, True)])
def test_a_late_cycle_reads_nothing_before_its_last_pass_is_queued(order, shared, batch, sample, lookup):
    """And once behind it, where nobody looks at the text on the way; a text ends within a draft."""
    model, (ids, mask) = shared(), padded(batch)
    torch.manual_seed(5)
    text = generate(make("llama"), ids, mask, do_sample=sample)[0, ids.shape[1] :].tolist()
    options = {"do_sample": sample, "eos_token_id": max(text, key=text.index), "pad_token_id": 0}
    torch.manual_seed(5)
    expected = generate(make("llama"), ids, mask, **options)
    torch.manual_seed(5)
    order.clear()
    with river_compile.trace() as trace:
        assert torch.equal(exactly(model, ids, mask, prompt_lookup=lookup, **options), expected)
    assert sum(cycle.accepted for cycle in trace.cycles) > 0
    cycles = "".join(what[0] for what in order[order.index("draft") :])
    reads = "r+" if sample else "r"
    assert re.fullmatch(f"(d*v{reads})+", cycles), cycles
    assert cycles.count("v") == len(trace.cycles)


#: Counts what the host waits for in cycles whose kinds of passes all ran before, on a card that is not there.
WAITS = """
from unittest import mock
from tools.rehearsal import card
card.install()
import torch
import river_compile
from river_compile.decoding.loop import DecodeLoop
from tests.decoding.test_exact import OPTIONS, exactly, generate, make
from tests.support.families import prompt

refuse, run, cycle, waits, counts = card._refuse, card.Clock.run, DecodeLoop._cycle, [], []

def refusing(what):  # (it is asked by all that no capture allows; an event behind what was read is no wait)
    waits.extend([what] if what.startswith("a copy") else [])
    refuse(what)

def running(name, work):
    waits.extend([name] if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero") else [])
    return run(name, work)

def counting(*args):
    waits.clear()
    cycle(*args)
    counts.append(len(waits))

ids = prompt(12, batch)
model = make("llama").to("cuda")
model.compile(backend=river_compile.river, options={**OPTIONS, "cudagraphs": True})
options = {"prompt_lookup": False, "max_new_tokens": 30}
exactly(model, ids.cuda(), **options)
with mock.patch.multiple(card, _refuse=refusing), mock.patch.object(card.Clock, "run", running):
    with mock.patch.object(DecodeLoop, "_cycle", counting):
        with river_compile.trace() as trace:
            text = exactly(model, ids.cuda(), **options)
assert torch.equal(text.cpu(), generate(make("llama"), ids, max_new_tokens=30))
assert 0 < sum(cycle.accepted for cycle in trace.cycles) < sum(len(cycle.drafted) for cycle in trace.cycles)
assert any(graph.captures.made for graph in river_compile.report(model).graphs)
# (The inputs of the first two passes of a width are transformers', which waits.)
assert len(counts) > 5 and set(counts[2:-3]) == {1}, counts
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has a card of its own")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cycle_on_a_card_waits_once(batch):
    run_python(f"batch = {batch}\n{WAITS}", ROOT, ROOT)


def test_models_that_have_no_two_paths_are_refused():
    with pytest.raises(ValueError, match="never reached"):
        exactly(make("llama"), prompt())
    with pytest.raises(ValueError, match=r"the whole backbone was asked for, .* exit_depth=1"):
        exactly(compiled(exit_depth=1), prompt(1))
    for option, message in (({"prefill": "exit"}, "prefill='exit'"), ({"exit_depth": 1}, "exit_depth=1")):
        with pytest.raises(ValueError, match=message):
            exactly(compiled(**option), prompt())


def test_adaptive_calls_go_on_with_what_earlier_ones_learned(shared):
    """By greedy and sampled texts; where drafts are to be the same in every run, each call begins anew."""
    model, ids = shared(), prompt(12)
    learned = record_of(model.parameters()).drafts.rates
    exactly(model, ids, max_new_tokens=8)
    assert not learned
    exactly(model, ids, max_new_tokens=8, adaptive=True)
    rates = learned[False]
    exactly(model, ids, max_new_tokens=8, adaptive=True)
    assert learned[False] is rates
    exactly(model, ids, max_new_tokens=8, adaptive=True, do_sample=True)
    assert set(learned) == {False, True}


def test_dynamos_limit_of_graphs_makes_room_for_every_width(fresh_dynamo):
    """The prompt's and the decode step's graph fill what is allowed; any further one would be an error here."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        model, ids = compiled(), prompt()
        assert torch.equal(generate(model, ids), generate(make("llama"), ids))
        for lookup in (False, True):
            assert torch.equal(exactly(model, ids, prompt_lookup=lookup), generate(make("llama"), ids))


@pytest.mark.core
def test_a_cache_of_the_users_that_is_too_small_is_named(fresh_dynamo):
    model = compiled()
    with pytest.raises(river_compile.CacheFullError, match="holds 20 tokens"):
        exactly(model, prompt(), **{cache_argument(model): StaticCache(config=model.config, max_cache_len=20)})
