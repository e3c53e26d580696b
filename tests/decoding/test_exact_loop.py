"""The loop of exact mode on a scripted model: it keeps plain generation's text, calls and cache, whatever the drafts.

Also proved here: sampled text has the plain model's distribution, and the parts of a drafter do what they say.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import river_compile
from river_compile.decoding.admission import verification_widths
from river_compile.decoding.batch import Rows, generate
from river_compile.decoding.draft_length import DraftLength
from river_compile.decoding.drafters import Twins
from river_compile.decoding.sampling import Sampler, SuffixAutomaton
from river_compile.decoding.speculative import Drafting
from river_compile.decoding.text import Ends, Text
from tests.support.examples import slow
from tests.support.scripted import VOCABULARY, ScriptedRunner

PAD = 0
TEXTS = 5_000


class Recorder:
    """Stopping criteria and a streamer that note what they are given; rows end at `eos` or at `max_length` ids."""

    def __init__(self, eos, max_length):
        self.eos, self.max_length = eos, max_length
        self.seen, self.streamed = [], []

    def stops(self, ids, scores):
        self.seen.append(ids.tolist())
        return (ids[:, -1] == self.eos) | (ids.shape[1] >= self.max_length)

    def put(self, tokens):
        self.streamed.append(tokens.tolist())


def texts_of(runner, prompt, recorder, process=(), do_sample=False, **fields):
    """Returns the call's one text, or its rows, on a scripted runner."""
    common = {
        "prompt": prompt,
        "sampler": Sampler(len(prompt), do_sample, process),
        "stops": recorder.stops,
        "max_length": recorder.max_length,
        "put": recorder.put,
    }
    if len(prompt) == 1:
        return Text(**common | fields)
    texts = Rows(**common | {"pad_token": PAD, "are_independent": True} | fields)
    runner.ended = lambda: [not active for active in texts.active]
    return texts


def run(runner, texts, max_copied=sys.maxsize, adaptive=False, length=None):
    """Generates texts, which draft; returns all ids."""
    length = DraftLength(adaptive) if length is None else length
    texts.append_next(first_logits(runner, texts.prompt)[:, 0])
    return generate(runner, texts, Drafting(length.carry_over(runner.widths), max_copied, (Twins(runner),)))


def run_on(runner, prompt, recorder, max_copied=sys.maxsize, adaptive=False, length=None, **options):
    return run(runner, texts_of(runner, prompt, recorder, **options), max_copied, adaptive, length)


def first_logits(runner, prompt):
    return torch.stack([runner.logits(row) for row in prompt.tolist()])[:, None]


def plain(runner, prompt, recorder):
    """Plain greedy generation, as transformers does it."""
    ids, active = prompt, torch.ones(len(prompt), dtype=torch.bool)
    while active.any():
        tokens = first_logits(runner, ids)[:, 0].argmax(-1)
        tokens = torch.where(active, tokens, PAD)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        active = active & ~recorder.stops(ids, None)
        recorder.put(tokens)
    return ids


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    river_right=st.integers(0, 10),
    max_draft=st.sampled_from([1, 3, 7, 15]),
    new_tokens=st.integers(1, 40),
    spare_slots=st.integers(-1, 8),
    eos=st.integers(-1, VOCABULARY - 1),
    memory=st.integers(1, 6),
    max_copied=st.sampled_from([0, 2, sys.maxsize]),
    adaptive=st.booleans(),
    independent=st.booleans(),
    asked=st.booleans(),
    late=st.booleans(),
)
def test_text_calls_and_cache_are_those_of_plain_generation(
    seed,
    batch,
    river_right,
    max_draft,
    new_tokens,
    spare_slots,
    eos,
    memory,
    max_copied,
    adaptive,
    independent,
    asked,
    late,
):
    """Whatever agrees, wherever the texts end, however few slots are left: ids and streamer match.

    The calls of criteria (where they are asked) and the cache match too, but for rows that have ended and left.
    """
    prompt = torch.randint(1, VOCABULARY, (batch, 5), generator=torch.Generator().manual_seed(seed))
    max_length = 5 + new_tokens
    expected_calls, calls = Recorder(eos, max_length), Recorder(eos, max_length)
    runner = ScriptedRunner(prompt, seed, river_right, max_draft, max_length + spare_slots, memory)
    runner.runs_late = late
    expected = plain(runner, prompt, expected_calls)
    fields = {} if batch == 1 else {"are_independent": independent}
    if not asked:
        fields["stops"] = Ends(max_length, frozenset({eos}))
    ids = run_on(runner, prompt, calls, max_copied, adaptive, **fields)
    assert ids.tolist() == expected.tolist()
    assert calls.streamed == expected_calls.streamed

    def of_rows_left(seen):
        return [[call[row] for row in runner.rows] if len(call) == batch else call for call in seen]

    assert of_rows_left(calls.seen) == (of_rows_left(expected_calls.seen) if asked else [])
    assert runner.slots == [[(token, True) for token in expected[row, :-1].tolist()] for row in runner.rows]


def test_the_last_row_of_a_batch_goes_on_alone_and_drafts():
    """Three of four end early: passes are of one row from then on; unless rows belong together, or it costs more."""
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 2]])
    script = ScriptedRunner(prompt, 11, 7, 7, capacity=100, memory=3)
    texts = plain(script, prompt, Recorder(-1, 60))[:, 3:].tolist()
    eos = min(range(VOCABULARY), key=lambda token: sum(token in text for text in texts) or len(texts) + 1)
    expected = plain(script, prompt, Recorder(eos, 60)).tolist()
    for independent, shrinks in ((True, True), (False, True), (True, False)):
        runner = ScriptedRunner(prompt, 11, 7, 7, capacity=100, memory=3)
        runner.shrinks = shrinks
        with river_compile.trace() as trace:
            assert run_on(runner, prompt, Recorder(eos, 60), 0, are_independent=independent).tolist() == expected
        assert (len(runner.rows) == 1) == bool(trace.cycles) == (independent and shrinks)


def test_rows_that_end_without_padding_go_on_to_the_last_ones_end():
    """Sequences end together, at their longest, so generate knows of no token that stands for padding."""
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    runner, ours, expected = ScriptedRunner(prompt, 3, 5, 7, 60, memory=3), Recorder(-1, 40), Recorder(-1, 40)
    assert run_on(runner, prompt, ours, pad_token=None).tolist() == plain(runner, prompt, expected).tolist()
    assert ours.streamed == expected.streamed


def test_steps_that_are_read_together_are_those_that_are_read_one_by_one():
    """Where drafts have one length both ways, so is all that is learned."""
    prompt, learned = torch.tensor([[1, 2, 3]]), []
    for late in (False, True):
        runner = ScriptedRunner(prompt, 5, 8, 7, capacity=100, memory=6)
        runner.runs_late = late
        length = DraftLength(adaptive=False)
        with river_compile.trace() as trace:
            ids = run_on(runner, prompt, Recorder(-1, 40), False, length=length)
        assert ids.tolist() == plain(runner, prompt, Recorder(-1, 40)).tolist()
        cycles = [(cycle.drafted, cycle.emitted) for cycle in trace.cycles]
        learned.append(([length.token(0, "river", nats) for nats in (0.01, 0.3, 1.2, 2.5)], cycles))
    assert learned[0] == learned[1]


def test_an_error_in_the_calls_own_code_ends_its_texts_and_is_raised():
    """Whatever it is, and the text has no further token."""
    prompt = torch.tensor([[1, 2, 3]])
    for error in (ValueError("no"), KeyboardInterrupt()):
        runner = ScriptedRunner(prompt, 5, 8, 7, capacity=100, memory=6)
        texts = texts_of(runner, prompt, Recorder(-1, 40))

        def put(tokens, error=error, texts=texts):
            if texts.new_tokens == 5:
                raise error

        texts.put = put
        with pytest.raises(type(error)):
            run(runner, texts)
        assert texts.new_tokens == 5


@pytest.mark.parametrize("free", range(1, 10))
def test_a_nearly_full_cache_is_filled_to_its_last_slot(free):
    prompt = torch.tensor([[1, 2, 3]])
    recorder = Recorder(-1, 3 + free + 1)
    runner = ScriptedRunner(prompt, 3, 10, 15, capacity=3 + free, memory=6)
    ids = run_on(runner, prompt, recorder)
    assert ids.shape[1] == 3 + free + 1
    assert runner.filled == 3 + free


def test_good_drafts_save_passes_and_the_trace_tells_where_tokens_came_from():
    prompt = torch.tensor([[1, 2, 3]])
    runner = ScriptedRunner(prompt, 5, 10, 7, capacity=100, memory=6)
    with river_compile.trace() as trace:
        run_on(runner, prompt, Recorder(-1, 43), max_copied=0)
    kept = trace.kept_sources
    assert sum(kept.values()) == 39  # the first of 40 tokens comes from the prompt's own pass
    assert kept == {"river": 34, "backbone": 5}  # four cycles of 7 + 1, and one of 6 + 1 at the end
    assert trace.acceptance_by_position == [1.0] * 7
    assert all(cycle.width == 8 for cycle in trace.cycles)


@pytest.mark.parametrize(
    ("max_draft", "widths"),
    [
        (1, (1, 2)),
        (5, (1, 2, 4, 6)),
        (6, (1, 2, 4, 6, 7)),
        (15, (1, 2, 4, 6, 8, 16)),
        (200, (1, 2, 4, 6, 8, 16, 32, 64, 128, 201)),
    ],
)
def test_passes_have_few_widths(max_draft, widths):
    assert verification_widths(max_draft) == widths


def chi_square(counts, expected):
    return (((counts - expected) ** 2) / expected).sum().item()


def test_tokens_are_those_that_multinomial_draws():
    """For one seed: in any order of asking, and with the generator left where as many draws leave it."""
    scores = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    expected = [torch.multinomial(s.softmax(-1), num_samples=1)[:, 0].tolist() for s in scores]
    after = torch.rand(1)
    torch.manual_seed(7)
    sampler, ids = Sampler(3, do_sample=True), torch.zeros(1, 4, dtype=torch.long)
    ours = [[0] * 3 for _ in range(5)]
    for row, step in [(2, 1), (0, 4), (0, 0), (2, 0), (1, 3), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2)]:
        ours[step][row] = sampler.choose(scores[step, row : row + 1], ids, [row], step).item()
        assert ours[step][row] == expected[step][row]
    sampler.forget(5)
    sampler.draft(scores[0, :1], ids, 0, 9)  # a draft that reached beyond the end
    sampler.close(5)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("max_copied", [slow(0), sys.maxsize])
def test_sampled_texts_have_the_plain_models_distribution(max_copied):
    """Pairs of tokens, with temperature, top-p and a repetition penalty."""
    torch.manual_seed(1)
    process = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)]
    )
    prompt = torch.tensor([[1, 2, 1, 2, 1]])
    script = ScriptedRunner(prompt, 4, 3, 3, capacity=100, memory=2)
    expected = torch.zeros(VOCABULARY, VOCABULARY)
    first = process(prompt, first_logits(script, prompt)[:, 0]).softmax(-1)[0]
    for token in range(VOCABULARY):
        ids = torch.cat([prompt, torch.tensor([[token]])], dim=1)
        expected[token] = first[token] * process(ids, first_logits(script, ids)[:, 0]).softmax(-1)[0]
    counts = torch.zeros(VOCABULARY * VOCABULARY)
    for _ in range(TEXTS):
        runner = ScriptedRunner(prompt, 4, 8, 3, capacity=100, memory=2)
        ids = run_on(runner, prompt, Recorder(-1, 8), max_copied, process=process, do_sample=True)
        counts += (ids[:, 5] * VOCABULARY + ids[:, 6]).bincount(minlength=VOCABULARY**2)
    likely = expected.flatten() * TEXTS >= 5
    assert counts[expected.flatten() == 0].sum() == 0  # top-p leaves no such text
    degrees = int(likely.sum()) - 1
    assert degrees > 10
    assert chi_square(counts[likely], expected.flatten()[likely] * TEXTS) < degrees + 4 * (2 * degrees) ** 0.5


def test_a_repeated_ngram_is_continued_and_the_longest_wins():
    index = SuffixAutomaton([1, 2, 3, 4, 9, 2, 3, 7, 7, 1, 2, 3])
    assert index.continuation(3) == ([4, 9, 2], 3)  # 1 2 3 occurred first; 2 3 alone was last followed by 7
    assert index.continuation(2, ahead=[7]) == ([7, 1], 3)
    assert SuffixAutomaton([1, 2, 3]).continuation(3) == ([], 0)
    assert SuffixAutomaton([5, 6, 5, 6]).continuation(5) == ([5, 6, 5, 6, 5], 2)
