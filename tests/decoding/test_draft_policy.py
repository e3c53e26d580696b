"""How long to draft: by what drafts gain and cost, on numbers alone."""

import json

import pytest

from river_compile.decoding.draft_policy import ByChance, ByGain, Proposed, RowDraft
from river_compile.runtime.draft_stats import AcceptanceRate, DraftHistory, DraftRates, PassTimes


def width(drafted):
    return next(w for w in (1, 2, 4, 8, 16) if w > drafted)


def times(draft, each_row=0.0, **others):
    """Returns times in which a pass of width w takes 1 + each_row * (w - 1), or others[f"w{w}"]."""
    found = PassTimes()
    passes = ((w, others.get(f"w{w}", 1 + each_row * (w - 1))) for w in (1, 2, 4, 8, 16))
    for kind, seconds in [(PassTimes.DRAFT, draft), *passes]:
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


def steps_taken(rule, chance, room=15, rows=1):
    """Returns how many steps the river takes where each of its tokens holds with this chance."""
    drafts = [draft_of(room=room) for _ in range(rows)]
    for steps in range(room + 1):
        if rule.verify_now(drafts, steps, chance) is not None:
            return steps
        for row in drafts:
            row.add(*tokens(1, chance, "river"))
    raise AssertionError("drafted beyond the room")


def test_drafts_are_longer_where_they_are_cheap_or_sure():
    assert steps_taken(ByGain(times(0.01), width, False), 0.9) > steps_taken(ByGain(times(0.3), width, False), 0.9) > 0
    assert steps_taken(ByGain(times(0.3), width, False), 0.95) > steps_taken(ByGain(times(0.3), width, False), 0.6)


def test_drafts_that_do_not_pay_are_not_made():
    """A step that takes as long as the pass it may save is not worth it, nor is one in a batch whose passes cost each
    row what it costs alone."""
    assert steps_taken(ByGain(times(1.0), width, False), 0.9) == 0
    assert steps_taken(ByGain(times(0.3, each_row=1.0), width, False), 0.9, rows=8) == 0


def test_the_next_width_is_reached_for_as_a_whole():
    """The fourth drafted token alone does not pay for a pass of eight; it and the three after it do."""
    rule = ByGain(times(0.02, w8=1.9, w16=9.0), width, False)
    assert steps_taken(rule, 0.95, room=4) == 3
    assert steps_taken(rule, 0.95, room=7) == 7


def test_copies_are_verified_as_far_as_they_pay():
    cheap, dear = ByGain(times(0.3), width, False), ByGain(times(0.3, each_row=0.9), width, False)
    rows = [draft_of(copy=tokens(15, 0.95))]
    assert cheap.verify_now(rows, 0, 0.5) == 15
    assert dear.verify_now(rows, 0, 0.5) <= 3


def test_rows_that_keep_only_what_all_keep_draft_less():
    """Eight rows whose drafts hold with 0.7 each hold together once in 17 times."""
    assert steps_taken(ByGain(times(0.1), width, False), 0.7, rows=8) > 0
    assert steps_taken(ByGain(times(0.1), width, True), 0.7, rows=8) == 0


def test_what_time_is_worth_follows_what_cycles_bring():
    """Where cycles keep many tokens, a step that saves half of one is no longer worth its time."""
    rule = ByGain(times(0.3), width, False)
    assert steps_taken(rule, 0.5) > 0
    for _ in range(100):
        rule.note(tokens=4, steps=0, width=1)
    assert steps_taken(rule, 0.5) == 0


@pytest.mark.parametrize(("stop_below", "steps"), [(1.0, 1), (0.5, 4), (0.0, 15)])
def test_a_limit_of_the_chance_ends_drafts_whatever_they_cost(stop_below, steps):
    """0.84 ** 4 is below a half, and 0.84 ** 3 is not: the fourth token is the one that ends the draft."""
    assert steps_taken(ByChance(stop_below, width), 0.84) == steps


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
    assert found.preparing == pytest.approx(0.4)


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


def test_where_the_river_rests_copies_are_verified_and_nothing_is_drafted():
    for rule in (ByGain(times(0.01), width, False), ByChance(0.3, width)):
        assert rule.verify_now([draft_of(copy=tokens(3, 0.95))], 0, None) == 3
        assert rule.verify_now([draft_of()], 0, None) == 0


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


def test_what_was_learned_is_the_same_in_another_process():
    """Rates and times go through JSON."""
    history, other = DraftHistory(), DraftHistory()
    rates = history.rates[True] = DraftRates()
    for i in range(50):
        rates.by_entropy.learn(0.1 * (i % 7), held=i % 3 > 0)
        rates.by_match.learn(i % 9, held=i % 2 > 0)
    times = history.times[2] = PassTimes()
    for kind, seconds in ((PassTimes.DRAFT, 0.25), (1, 1.0), (4, 1.5)):
        for _ in range(3):
            times.note(kind, seconds)
    other.restore(json.loads(json.dumps(history.to_json())), lambda: 0)
    assert [other.rates[True].by_entropy.chance(x) for x in (0.0, 0.3, 9.0)] == [
        rates.by_entropy.chance(x) for x in (0.0, 0.3, 9.0)
    ]
    assert other.rates[True].by_match.chance(3) == rates.by_match.chance(3)
    kinds = (PassTimes.DRAFT, 1, 2, 4, 8)
    assert [other.times[2].of(kind) for kind in kinds] == [times.of(kind) for kind in kinds]
    with pytest.raises(ValueError, match="zip"):
        other.rates[True].river.restore([[1.0, 2.0], [1.0]])
