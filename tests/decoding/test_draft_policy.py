"""How long to draft: by what drafts gain and cost, on numbers alone."""

import pytest

from river_compile.decoding.draft_policy import ByGain, FixedLength, Proposed, RowDraft
from river_compile.runtime.draft_stats import AcceptanceRate, DraftRates, PassTimes

WIDTHS = (1, 2, 4, 8, 16)


def width(drafted):
    return next(w for w in WIDTHS if w > drafted)


def times(draft, each_token=0.0, **others):
    """Returns times in which a pass of width w takes 1 + each_token * (w - 1), or others[f"w{w}"]."""
    return noted(PassTimes(), draft, {w: others.get(f"w{w}", 1 + each_token * (w - 1)) for w in WIDTHS})


def noted(found, draft, passes):
    for kind, seconds in {PassTimes.DRAFT: draft, **passes}.items():
        for _ in range(4):  # (fewer are not believed)
            found.note(kind, seconds)
    return found


def tokens(count, chance, source="lookup"):
    return [Proposed(i, source, AcceptanceRate([], [chance]), 0.0) for i in range(count)]


def draft_of(proposed=(), copy=(), room=15):
    row = RowDraft(room, copy=list(copy))
    for token in proposed:
        row.add(token)
    return row


def steps_taken(rule, chance, room=15):
    """Returns how many steps the river takes where each of its tokens holds with this chance."""
    draft = draft_of(room=room)
    for steps in range(room + 1):
        if rule.verify_now(draft, chance) is not None:
            return steps
        draft.add(*tokens(1, chance, "river"))
    raise AssertionError("drafted beyond the room")


def test_drafts_are_longer_where_they_are_cheap_or_sure():
    assert steps_taken(ByGain(times(0.01), width), 0.9) > steps_taken(ByGain(times(0.3), width), 0.9) > 0
    assert steps_taken(ByGain(times(0.3), width), 0.95) > steps_taken(ByGain(times(0.3), width), 0.6)


def test_drafts_that_do_not_pay_are_not_made():
    """A step that takes as long as the pass it may save is not worth it, nor is one whose token costs a whole pass."""
    assert steps_taken(ByGain(times(1.0), width), 0.9) == 0
    assert steps_taken(ByGain(times(0.3, each_token=1.0), width), 0.9) == 0


def test_the_next_width_is_reached_for_as_a_whole():
    """The fourth drafted token alone does not pay for a pass of eight; it and the three after it do."""
    rule = ByGain(times(0.02, w8=1.9, w16=9.0), width)
    assert steps_taken(rule, 0.95, room=4) == 3
    assert steps_taken(rule, 0.95, room=7) == 7


def test_copies_are_verified_as_far_as_they_pay():
    cheap, dear = ByGain(times(0.3), width), ByGain(times(0.3, each_token=0.9), width)
    draft = draft_of(copy=tokens(15, 0.95))
    assert cheap.verify_now(draft, 0.5) == 15
    assert dear.verify_now(draft, 0.5) <= 3


def test_what_time_is_worth_follows_what_cycles_bring():
    """Where cycles keep many tokens, a step that saves half of one is no longer worth its time."""
    rule = ByGain(times(0.3), width)
    assert steps_taken(rule, 0.5) > 0
    for _ in range(100):
        rule.note(4, steps=0, width=1)
    assert steps_taken(rule, 0.5) == 0


def test_what_is_not_known_is_tried():
    found = PassTimes()
    for _ in range(4):
        found.note(1, 1.0)
    assert steps_taken(ByGain(found, width), 0.7) > 0


def test_drafts_of_fixed_length_take_all_the_room_whatever_they_cost():
    assert steps_taken(FixedLength(width), 0.1) == steps_taken(FixedLength(width), 0.9) == 15


def test_before_passes_are_measured_they_count_in_proportion():
    found = PassTimes()
    guess = found.of(8) / found.of(1)
    for seconds in (3.0, 2.0, 9.0, 2.5):
        found.note(1, seconds)
    assert found.of(1) == 2.0
    assert found.of(8) == pytest.approx(2.0 * guess)


def test_a_narrow_pass_that_was_never_measured_is_tried_where_wide_ones_are_dear():
    """Nothing says that one token costs as much as sixteen: sums may be what takes the time, as in large batches."""
    found = PassTimes()
    for _ in range(4):
        found.note(PassTimes.DRAFT, 0.015)
        found.note(16, 0.170)
    assert [found.of(w) for w in (1, 2)] == pytest.approx([0.170 / 16, 0.170 / 8])
    assert found.of(16) == 0.170


def test_a_wide_pass_costs_no_less_than_narrower_ones():
    """Where two tokens cost nearly twice one, sixteen are not tried as if they cost little more than one."""
    found = PassTimes()
    for _ in range(4):
        found.note(1, 1.0)
        found.note(2, 1.8)
    assert found.of(16) > 1.8
    found.note(16, 9.0)
    assert found.of(16) < 9.0  # (a single slow pass may have had other reasons)


def test_passes_in_which_something_was_prepared_do_not_count():
    graphs = [0]
    found = PassTimes(lambda: graphs[0])
    for seconds in (2.0, 2.0, 2.0, 2.0):
        graphs[0] += 1
        found.note(1, 0.1)
        found.note(1, seconds)
    assert found.of(1) == 2.0


def test_what_seems_dear_is_tried_again():
    """A few slow passes are not believed, and what was slow long ago is not any more."""
    found = times(0.3)
    found.note(32, 100.0)
    assert found.of(32) < 2.0
    for _ in range(4):
        found.note(32, 100.0)
    assert found.of(32) == 100.0
    for _ in range(600):
        found.note(1, 1.0)
    assert found.of(32) < 2.0


def test_what_other_texts_taught_is_unlearned_quickly():
    """A hundred tokens of them held; a rate that goes on keeps that in mind, for as long as a few tokens take."""
    rates, anew = DraftRates(), DraftRates()
    for _ in range(100):
        rates.by_match.learn(3, True)
    assert rates.go_on().by_match.chance(3) > 0.9 > anew.by_match.chance(3)
    for _ in range(16):
        rates.by_match.learn(3, False)
    assert rates.by_match.chance(3) < 0.55
    assert anew.go_on().by_match.chance(3) == anew.by_match.chance(3)
