"""The loop of exact mode on a scripted model: it keeps plain generation's text, calls and cache, whatever the drafts.

Also proved here: sampled text has the plain model's distribution, and the parts of a drafter do what they say.
"""

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
from river_compile.decoding.draft_policy import ByGain, FixedLength
from river_compile.decoding.drafter import Drafter
from river_compile.decoding.lookup import SuffixAutomaton
from river_compile.decoding.loop import DecodeLoop
from river_compile.decoding.request import Ends, Request
from river_compile.decoding.sampling import Chooser, RowProcessors
from river_compile.runtime.draft_stats import AcceptanceRate, DraftRates, PassTimes
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


def loop_on(runner, prompt, recorder, lookup=True, adaptive=False, process=None, do_sample=False, rates=None):
    times = PassTimes()
    rule = ByGain(times, runner.width_for) if adaptive else FixedLength(runner.width_for)
    request = Request(
        prompt=prompt,
        chooser=Chooser(len(prompt), do_sample),
        process=None if process is None else RowProcessors(process),
        process_draft=None if process is None else RowProcessors(process),
        stops=recorder.stops,
        max_length=recorder.max_length,
        pad_token=PAD,
        put=recorder.put,
        rows_are_independent=True,
    )
    runner.ended = lambda: [not active for active in request.active]
    return DecodeLoop(runner, Drafter(lookup, rule, times, rates=rates)), request


def run_on(runner, prompt, *arguments, **options):
    loop, request = loop_on(runner, prompt, *arguments, **options)
    return loop.run(request, first_logits(runner, prompt))


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
    lookup=st.booleans(),
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
    lookup,
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
    loop, request = loop_on(runner, prompt, calls, lookup, adaptive)
    request.rows_are_independent = independent
    if not asked:
        request.stops = Ends(max_length, frozenset({eos}))
    ids = loop.run(request, first_logits(runner, prompt))
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
        loop, request = loop_on(runner, prompt, Recorder(eos, 60), False)
        request.rows_are_independent = independent
        with river_compile.trace() as trace:
            assert loop.run(request, first_logits(runner, prompt)).tolist() == expected
        assert (len(runner.rows) == 1) == bool(trace.cycles) == (independent and shrinks)


def test_rows_that_end_without_padding_go_on_to_the_last_ones_end():
    """Sequences end together, at their longest, so generate knows of no token that stands for padding."""
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    runner, ours, expected = ScriptedRunner(prompt, 3, 5, 7, 60, memory=3), Recorder(-1, 40), Recorder(-1, 40)
    loop, request = loop_on(runner, prompt, ours)
    request.pad_token = None
    assert loop.run(request, first_logits(runner, prompt)).tolist() == plain(runner, prompt, expected).tolist()
    assert ours.streamed == expected.streamed


class LikelyEnough(FixedLength):
    """Ends drafts that are not as likely to hold in whole."""

    def __init__(self, least, width):
        super().__init__(width)
        self.least, self.width = least, width

    def verify_now(self, draft, river):
        if draft.open and draft.reach >= self.least:
            return super().verify_now(draft, river)
        return self.width(len(draft.proposed)) - 1


def test_late_drafts_are_as_long_as_the_rivers_average_says_and_teach_as_much():
    """What the steps chose is read behind them: where drafts have one length both ways, so is all that is learned."""
    prompt, learned, drafted = torch.tensor([[1, 2, 3]]), [], []
    for late, least in ((False, 0.0), (True, 0.0), (True, 0.3)):
        runner = ScriptedRunner(prompt, 5, 8, 7, capacity=100, memory=6)
        runner.runs_late = late
        rates = DraftRates()
        loop, request = loop_on(runner, prompt, Recorder(-1, 40), False, rates=rates)
        loop.drafter.rule = LikelyEnough(least, runner.width_for)
        with river_compile.trace() as trace:
            ids = loop.run(request, first_logits(runner, prompt))
        assert ids.tolist() == plain(runner, prompt, Recorder(-1, 40)).tolist()
        cycles = [(cycle.drafted, cycle.kept) for cycle in trace.cycles]
        learned.append((vars(rates.by_entropy), vars(rates.river), cycles))
        drafted.append(len(trace.cycles[0].drafted))
    assert learned[0] == learned[1]
    assert drafted == [7, 7, 4]  # (0.7 ** 4 is less than 0.3)


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
        run_on(runner, prompt, Recorder(-1, 43), lookup=False)
    kept = trace.kept_sources
    assert sum(kept.values()) == 39  # the first of 40 tokens comes from the prompt's own pass
    assert kept == {"river": 34, "backbone": 5}  # four cycles of 7 + 1, and one of 6 + 1 at the end
    assert trace.acceptance_by_position == [1.0] * 7
    assert all(cycle.width == 8 for cycle in trace.cycles)


def chi_square(counts, expected):
    return (((counts - expected) ** 2) / expected).sum().item()


def test_tokens_are_those_that_multinomial_draws():
    """For one seed: in any order of asking, and with the generator left where as many draws leave it."""
    scores = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    expected = [torch.multinomial(s.softmax(-1), num_samples=1)[:, 0].tolist() for s in scores]
    after = torch.rand(1)
    torch.manual_seed(7)
    chooser = Chooser(3, do_sample=True)
    ours = [[0] * 3 for _ in range(5)]
    for row, step in [(2, 1), (0, 4), (0, 0), (2, 0), (1, 3), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2)]:
        ours[step][row] = chooser.choose(scores[step, row : row + 1], [row], step).item()
        assert ours[step][row] == expected[step][row]
    chooser.forget(5)
    chooser.choose(scores[0, :1], [0], 9)  # a draft that reached beyond the end
    chooser.close(5)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("lookup", [slow(False), True])
def test_sampled_texts_have_the_plain_models_distribution(lookup):
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
        ids = run_on(runner, prompt, Recorder(-1, 8), lookup, 0.0, process, do_sample=True)
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


def test_acceptance_is_learned_per_bin():
    estimate = AcceptanceRate([1.0], [0.5, 0.5])
    for _ in range(1000):
        estimate.learn(0.5, True)
        estimate.learn(2.0, False)
    assert estimate.chance(0.1) > 0.98
    assert estimate.chance(5.0) < 0.02
