"""Who drafts and how long: by what drafts gain and cost, on numbers alone."""

import itertools
import random

import pytest
import torch

from river_compile.decoding.draft_length import (
    ASSISTANT,
    LOOKUP,
    MTP,
    TWINS,
    AcceptanceRate,
    Draft,
    DraftLength,
    DraftToken,
    Plan,
)

WIDTHS = (1, 2, 4, 8, 16)


def width(drafted):
    return next(w for w in WIDTHS if w > drafted)


def measured(step, passes):
    """Returns a rule that was shown the seconds of draft steps and of passes by width, a few times each."""
    length = DraftLength()
    for _ in range(4):  # (fewer are not believed)
        for w, seconds in passes.items():
            show(length, w, seconds, step)
    return length.carry_over(WIDTHS)


def show(length, w, seconds, step=None, context=0):
    """Shows a cycle whose pass has a width, and of whose draft nothing was judged."""
    length.carry_over((w,) if w == 1 else (1, w), context)
    tokens = [] if w == 1 else [DraftToken(0, LOOKUP, 3.0, 0.5)]
    steps, source = (0, "") if step is None else (1, TWINS)
    draft = Draft(15, tokens, [0.5] * len(tokens), steps, source)
    length.learn(draft, (), 0.0 if step is None else step, seconds)


def rule(step, each_token=0.0, **others):
    """Returns one for which a pass of width w takes 1 + each_token * (w - 1) seconds, or others[f"w{w}"]."""
    return measured(step, {w: others.get(f"w{w}", 1 + each_token * (w - 1)) for w in WIDTHS})


def tokens(count, probability, source=LOOKUP):
    return [DraftToken(i, source, 0.0, probability) for i in range(count)]


def draft_of(proposed=(), copy=(), room=15):
    draft = Draft(room, copy=list(copy), source=next((token.source for token in proposed), ""))
    for token in proposed:
        draft.add(token)
    return draft


def steps_taken(length, probability, room=15, at_once=False):
    """Returns how many steps the twins take if each of its tokens holds with this probability."""
    length._next[TWINS] = AcceptanceRate([], [probability])
    draft = draft_of(room=room)
    for taken in range(room + 1):
        steps = length.plan(draft, [TWINS]).steps
        if at_once or not steps:
            return steps if at_once else taken
        draft.add(*tokens(1, probability, TWINS))
    raise AssertionError("drafted beyond the room")


def test_drafts_are_longer_where_they_are_cheap_or_sure():
    assert steps_taken(rule(0.01), 0.9) > steps_taken(rule(0.3), 0.9) > 0
    assert steps_taken(rule(0.3), 0.95) > steps_taken(rule(0.3), 0.6)


def test_drafts_that_do_not_pay_are_not_made():
    """A step that takes as long as the pass it may save is not worth it, nor is one whose token costs a whole pass."""
    assert steps_taken(rule(1.0), 0.9) == 0
    assert steps_taken(rule(0.3, each_token=1.0), 0.9) == 0


def test_mixtures_of_experts_copy_but_hardly_draft():
    """Each verified token reads other experts. A step pays once at most; a sure copy is verified."""
    length = rule(0.45, w2=1.7, w4=3.0, w8=5.2, w16=8.6)
    assert [steps_taken(length, probability) for probability in (0.5, 0.8, 0.9, 0.97)] == [0, 0, 0, 0]
    assert length.plan(draft_of(copy=tokens(15, 0.97)), [TWINS]) == Plan("", 0, 15)
    assert steps_taken(rule(0.25, w2=1.3, w4=2.4, w8=4.0, w16=7.0), 0.9) == 1


def mixture_text(share, step, rate, tokens=256, copied=False):
    """Returns how long a text takes with drafts, in passes of one token for each of its tokens.

    A token chooses 8 of 64 experts at random, which make up a share of what its pass reads. A step of the twins takes
    `step` passes, and each drafted token holds with this rate. `copied`: it is a copy from its first token on.
    """

    def reads(width):
        return 1 - share + share * 8 * (1 - 0.875**width)

    length, draws = DraftLength().carry_over(WIDTHS, reads=reads), random.Random(0)
    seconds = made = 0.0
    while made < tokens:
        draft = Draft(15, copy=[length.token(0, LOOKUP, made + i) for i in range(15 * copied)])
        while (plan := length.plan(draft, [TWINS])).steps:
            draft.source, draft.steps = plan.source, draft.steps + 1
            draft.add(length.token(0, TWINS, 0.3))
            draft.copy = draft.copy[: draft.room - len(draft.tokens)]
        for token in draft.copy[: max(plan.verified - len(draft.tokens), 0)]:
            draft.add(token)
        kept = [*itertools.takewhile(lambda _: draws.random() < rate, draft.tokens)]
        verifying = reads(width(len(draft.tokens))) + 0.01 * len(draft.tokens)
        length.learn(draft, [*(token.source for token in kept), "backbone"], draft.steps * step, verifying)
        seconds += draft.steps * step + verifying
        made += len(kept) + 1
    return seconds / made


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("step", [0.28, 0.45])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.9, 0.95])
def test_drafts_of_a_mixture_cost_two_percent_at_most(share, step, rate):
    """A first text finds out whether they hold; a long one also tries again now and then."""
    assert mixture_text(share, step, rate) < 1.02
    assert mixture_text(share, step, rate, tokens=2048) < 1.02


def test_a_mixture_drafts_where_that_pays():
    assert mixture_text(0.6, 0.28, 0.95, tokens=1024) < 0.85
    assert mixture_text(0.75, 0.45, 0.97, copied=True) < 0.55


def test_a_length_decided_at_once_is_that_of_steps_decided_one_by_one():
    """Where the tokens hold as often as the average says, so that a step tells nothing new."""
    for step, each_token in ((0.01, 0.0), (0.1, 0.02), (0.3, 0.0), (0.3, 0.1)):
        for probability in (0.5, 0.7, 0.9):
            assert steps_taken(rule(step, each_token), probability, at_once=True) == steps_taken(
                rule(step, each_token), probability
            )


def test_the_next_width_is_reached_for_as_a_whole():
    """The fourth drafted token alone does not pay for a pass of eight; it and the three after it do."""
    length = rule(0.02, w8=1.9, w16=9.0)
    assert steps_taken(length, 0.95, room=4) == 3
    assert steps_taken(length, 0.95, room=7) == 7


def test_copies_are_verified_as_far_as_they_pay():
    draft = draft_of(copy=tokens(15, 0.95))
    assert rule(0.3).plan(draft, [TWINS]) == Plan("", 0, 15)
    plan = rule(0.3, each_token=0.9).plan(draft, [TWINS])
    assert not plan.steps
    assert plan.verified <= 3


def test_what_time_is_worth_follows_what_cycles_bring():
    """Where cycles keep many tokens, a step that saves half of one is no longer worth its time."""
    length = rule(0.3)
    assert steps_taken(length, 0.5) > 0
    for _ in range(100):
        length.learn(Draft(15), ["backbone"] * 4, 0.0, 1.0)
    assert steps_taken(length, 0.5) == 0


def test_what_is_not_known_is_tried():
    assert steps_taken(measured(None, {1: 1.0}), 0.7) > 0


def test_drafts_of_fixed_length_take_all_the_room_whatever_they_cost():
    for probability in (0.1, 0.9):
        assert steps_taken(DraftLength(adaptive=False).carry_over(WIDTHS), probability) == 15


def test_drafts_of_fixed_length_are_copies_where_those_are_as_likely_to_hold():
    length = DraftLength(adaptive=False).carry_over(WIDTHS)
    assert length.plan(draft_of(copy=tokens(5, 0.9)), [TWINS]) == Plan("", 0, 5)
    assert length.plan(draft_of(copy=tokens(5, 0.1)), [TWINS]).steps == 15
    drafted = draft_of(tokens(2, 0.7, TWINS), tokens(5, 0.9))
    assert length.plan(drafted, [TWINS]) == Plan("", 0, 3)  # (no wider a pass than the draft's own)


def test_drafts_of_fixed_length_are_those_of_the_first_source():
    length = DraftLength(adaptive=False).carry_over(WIDTHS)
    assert length.plan(Draft(15), [ASSISTANT, TWINS]) == Plan(ASSISTANT, 15, 0)
    assert length.plan(Draft(15), []) == Plan("", 0, 0)  # (copies alone)


def two_sources(assistant, twins, rates, texts=300):
    """Returns how often each source was chosen in the second half of a text, by the steps' seconds and the rates."""
    length, seconds = DraftLength().carry_over(WIDTHS), {ASSISTANT: assistant, TWINS: twins}
    chosen = []
    draws = torch.Generator().manual_seed(0)
    for _ in range(texts):
        draft = Draft(15)
        while (plan := length.plan(draft, [ASSISTANT, TWINS])).steps:
            draft.source, draft.steps = plan.source, draft.steps + 1
            draft.add(length.token(0, plan.source, 0.3))
        kept = []
        for token in draft.tokens:
            if torch.rand((), generator=draws) >= rates[token.source]:
                break
            kept.append(token.source)
        drafting = draft.steps * seconds.get(draft.source, 0.0)
        length.learn(draft, [*kept, "backbone"], drafting, 1 + 0.02 * len(draft.tokens))
        chosen.append(draft.source)
    return {source: chosen[texts // 2 :].count(source) / (texts - texts // 2) for source in ("", ASSISTANT, TWINS)}


def test_the_source_that_gains_more_drafts():
    """A cheap assistant that holds often, slow twins that hold nearly always; on other texts it holds rarely."""
    assert two_sources(0.1, 0.3, {ASSISTANT: 0.85, TWINS: 0.95})[ASSISTANT] > 0.9
    assert two_sources(0.1, 0.3, {ASSISTANT: 0.4, TWINS: 0.95})[TWINS] > 0.9
    assert two_sources(0.9, 0.9, {ASSISTANT: 0.3, TWINS: 0.3})[""] > 0.8


def test_reading_what_others_drafted_is_no_part_of_a_step():
    """A source that was away reads first; its steps cost no more for that, or it would never draft again."""
    length = rule(0.2)
    for _ in range(5):
        length.learn(Draft(15, [], [], 2, ASSISTANT, behind={ASSISTANT: 4}), ["backbone"], 0.6, 1.0)
    assert length.seconds(ASSISTANT) == pytest.approx(0.1)


def test_a_draft_has_tokens_of_one_source():
    length = rule(0.01)
    drafted = draft_of(tokens(1, 0.9, ASSISTANT))
    assert length.plan(drafted, [TWINS, ASSISTANT]).source in (ASSISTANT, "")


def test_before_passes_are_measured_they_count_in_proportion():
    length = DraftLength()
    guess = length.seconds(8) / length.seconds(1)
    for seconds in (3.0, 2.0, 9.0, 2.5):
        show(length, 1, seconds)
    assert length.seconds(1) == 2.0
    assert length.seconds(8) == pytest.approx(2.0 * guess)


def test_a_narrow_pass_that_was_never_measured_is_tried_where_wide_ones_are_dear():
    """Nothing says that one token costs as much as sixteen: sums may be what takes the time, as in large batches."""
    length = measured(0.015, {16: 0.170})
    assert [length.seconds(w) for w in (1, 2)] == pytest.approx([0.170 / 16, 0.170 / 8])
    assert length.seconds(16) == 0.170


def test_a_wide_pass_costs_no_less_than_narrower_ones():
    """Where two tokens cost nearly twice one, sixteen are not tried as if they cost little more than one."""
    length = measured(None, {1: 1.0, 2: 1.8})
    assert length.seconds(16) > 1.8
    show(length, 16, 9.0)
    assert length.seconds(16) < 9.0  # (a single slow pass may have had other reasons)


def test_what_seems_dear_is_tried_again():
    """A few slow passes are not believed, and what was slow long ago is not any more."""
    length = rule(0.3)
    show(length, 32, 100.0)
    assert length.seconds(32) < 2.0
    for _ in range(4):
        show(length, 32, 100.0)
    assert length.seconds(32) == 100.0
    for _ in range(600):
        show(length, 1, 1.0)
    assert length.seconds(32) < 2.0


LONG = 4096


def begun_after_a_long_context(more):
    """Returns a rule that knows short contexts, and two passes of one token after a long one that took `more`."""
    length = rule(0.3)
    for _ in range(2):
        length.carry_over((1,), LONG).learn(Draft(15), ["backbone"], 0.0, 1.0 + more)
    return length.carry_over(WIDTHS, LONG)


def test_what_a_long_context_adds_to_one_pass_it_adds_to_all():
    """Each reads the cache once. Before a draft is tried there, a step costs nearly what it may save."""
    length = begun_after_a_long_context(more=4.0)
    assert [length.seconds(what) for what in (1, 8, TWINS)] == pytest.approx([5.0, 5.0, 4.3])
    assert steps_taken(length, 0.8) == 0
    assert steps_taken(rule(0.3), 0.8) > 0


def test_times_after_a_long_context_say_nothing_of_a_short_one():
    length = begun_after_a_long_context(more=4.0)
    for w in WIDTHS * 4:
        show(length, w, 20.0, context=LONG)
    length.carry_over(WIDTHS, LONG)
    assert length.seconds(8) == 20.0
    assert length.carry_over(WIDTHS).seconds(8) == 1.0


def test_a_single_slow_pass_after_a_long_context_is_not_believed():
    """The first one may record its operators."""
    length = rule(0.3)
    length.carry_over((1,), LONG).learn(Draft(15), ["backbone"], 0.0, 90.0)
    assert length.carry_over(WIDTHS, LONG).seconds(8) == 1.0


def test_drafts_that_stopped_paying_are_tried_again_after_a_while():
    length = rule(0.3)
    for _ in range(50):
        length.learn(draft_of(tokens(1, 0.7, TWINS)), ["backbone"], 0.3, 1.0)
    assert length.plan(Draft(15), [TWINS]).steps == 0
    for _ in range(200):
        length.learn(Draft(15), ["backbone"], 0.0, 1.0)
    assert length.plan(Draft(15), [TWINS]).steps > 0


def test_what_other_texts_taught_is_unlearned_quickly():
    """A hundred tokens of them held; a rule that carries over keeps that in mind, for as long as a few tokens take."""
    length, held = DraftLength(), DraftToken(0, LOOKUP, 3.0, 0.5)

    def judge(source):
        length.learn(Draft(15, [held], [0.5]), [source], 0.0, 1.0)

    length.carry_over(WIDTHS)
    for _ in range(100):
        judge(LOOKUP)
    prior = DraftLength().token(0, LOOKUP, 3.0).probability
    assert length.carry_over(WIDTHS).token(0, LOOKUP, 3.0).probability > 0.9 > prior
    for _ in range(16):
        judge("backbone")
    assert length.token(0, LOOKUP, 3.0).probability < 0.55


def test_acceptance_is_learned_per_bin():
    estimate = AcceptanceRate([1.0], [0.5, 0.5])
    for _ in range(1000):
        estimate.learn(0.5, True)
        estimate.learn(2.0, False)
    assert estimate.probability(0.1) > 0.98
    assert estimate.probability(5.0) < 0.02


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_source_with_a_limit_makes_no_longer_drafts(adaptive):
    """Neither planned together nor step by step, however much more would gain; others have their room."""
    length = rule(0.001) if adaptive else DraftLength(adaptive=False).carry_over(WIDTHS)
    for source, limits, expected in ((MTP, {MTP: 3}, 3), (TWINS, {MTP: 3}, 15)):
        length._next[source] = AcceptanceRate([], [0.95])
        draft = Draft(15, longest=limits)
        assert length.plan(draft, [source]).steps == expected
        for taken in range(expected):
            assert length.plan(draft, [source]).steps > 0, taken
            draft.source, draft.steps = source, taken + 1
            draft.add(*tokens(1, 0.95, source))
        assert length.plan(draft, [source]).steps == 0
