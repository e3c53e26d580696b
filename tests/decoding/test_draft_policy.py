"""How long to draft: by what drafts gain and cost, on numbers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_compile.decoding.draft_policy import ByGain, FixedLength, Proposed, RowDraft
from river_compile.runtime.draft_stats import AcceptanceRate, DraftHistory, DraftRates, PassTimes, most_at

WIDTHS = (1, 2, 4, 8, 16)
SECONDS = st.floats(0.01, 10.0)


def width(drafted):
    return next(w for w in WIDTHS if w > drafted)


def times(draft, each_row=0.0, **others):
    """Returns times in which a pass of width w takes 1 + each_row * (w - 1), or others[f"w{w}"]."""
    passes = {w: others.get(f"w{w}", 1 + each_row * (w - 1)) for w in WIDTHS}
    return noted(DraftHistory(), 1, {PassTimes.DRAFT: draft, **passes})


def noted(history, rows, passes):
    """Returns a model's times for batches of so many rows, in which passes of these kinds took these seconds."""
    found = history.times_of(rows, lambda: 0)
    for kind, seconds in passes.items():
        for _ in range(4):  # (fewer of one row are not believed)
            found.note(kind, seconds)
    return found


def batch_of(rows, one_row, one=1.0):
    """Returns the times of a batch that has only seen passes of one token each, and passes of one row of its model."""
    history = DraftHistory()
    noted(history, 1, one_row)
    return noted(history, rows, {1: one})


def tokens(count, chance, source="lookup"):
    return [Proposed(i, source, AcceptanceRate([], [chance]), 0.0) for i in range(count)]


def draft_of(proposed=(), copy=(), room=15):
    row = RowDraft(room, copy=list(copy))
    for token in proposed:
        row.add(token)
    return row


def steps_taken(rule, chance, room=15, rows=1):
    """Returns how many steps the river takes where each of its tokens holds with this chance."""
    return steps_and_verified(rule, chance, room, rows)[0]


def steps_and_verified(rule, chance, room=15, rows=1):
    """Returns that, and how many of the drafted tokens are verified."""
    drafts = [draft_of(room=room) for _ in range(rows)]
    for steps in range(room + 1):
        count = rule.verify_now(drafts, steps, chance)
        if count is not None:
            return steps, count
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
        rule.note({0: 4}, steps=0, width=1)
    assert steps_taken(rule, 0.5) == 0


def test_what_time_is_worth_is_the_rows_own_that_still_run():
    """Seven of eight have ended: the last one's drafts pay as well as if it had never had company."""
    rule = ByGain(noted(DraftHistory(), 8, {PassTimes.DRAFT: 0.1, **dict.fromkeys(WIDTHS, 1.0)}), width, False)
    for _ in range(20):
        rule.note(dict.fromkeys(range(8), 2), steps=1, width=2)
    assert steps_taken(rule, 0.9, rows=1) == steps_taken(rule, 0.9, rows=8) > 0


@given(
    st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=5),
    st.sets(st.integers(1, 600), min_size=1, max_size=6),
    st.integers(1, 2000),
)
def test_no_pass_takes_more_than_what_passes_of_other_numbers_of_tokens_say(pieces, known, tokens):
    """Of a time that is the largest of several, each with a fixed part and one by tokens: weights, sums, caches."""

    def seconds(n):
        return max(fixed + n * each for fixed, each in pieces)

    assert most_at(tokens, {n: seconds(n) for n in known}) >= seconds(tokens) * (1 - 1e-9)


def test_a_batchs_wide_passes_are_known_from_one_rows():
    """Eight rows of two tokens are a pass of sixteen; what eight rows cost more than one row's eight counts too."""
    batch = batch_of(8, {1: 0.5, 8: 0.8, 16: 1.6}, one=1.0)
    assert batch.at_most(2) == pytest.approx(1.6 / 0.8)
    assert batch.at_most(4) == pytest.approx(2 * 1.6 / 0.8)
    batch.note_prompt(30, 30 * 8 / 16)  # (a prompt of thirty tokens, at an eighth of a second each)
    assert batch.at_most(4) == pytest.approx(2.0 + 16 / 224 * 13.0)
    batch.note(4, 2.5)
    assert batch.at_most(4) == 2.5


def test_a_batchs_draft_steps_take_as_much_more_than_one_rows_as_its_passes_do():
    assert batch_of(8, {PassTimes.DRAFT: 0.3, 1: 0.8}, one=1.0).at_most(PassTimes.DRAFT) == pytest.approx(0.5)
    assert batch_of(8, {PassTimes.DRAFT: 0.6, 1: 0.4}, one=1.0).at_most(PassTimes.DRAFT) == 1.0
    assert batch_of(8, {1: 0.4}, one=1.0).at_most(PassTimes.DRAFT) == 1.0


@pytest.mark.parametrize(("of_sixteen", "steps"), [(0.85, 1), (1.9, 0)])
def test_a_batch_drafts_at_once_where_the_times_say_that_it_pays_and_never_tries_it_elsewhere(of_sixteen, steps):
    rule = ByGain(batch_of(8, {PassTimes.DRAFT: 0.3, 1: 0.8, 8: 0.8, 16: of_sixteen, 32: 9.0}), width, False)
    assert steps_taken(rule, 0.9, rows=8) == steps
    copies = [draft_of(copy=tokens(15, 0.9)) for _ in range(8)]
    assert rule.verify_now(copies, 0, 0.0) == steps


@given(
    st.integers(2, 16),
    st.dictionaries(st.sampled_from([PassTimes.DRAFT, *WIDTHS]), SECONDS, max_size=6),
    st.floats(0.0, 1.0),
    st.integers(0, 15),
)
def test_a_new_batch_tries_nothing_whose_bound_does_not_pay(rows, one_row, chance, copied):
    times = batch_of(rows, one_row)
    rule = ByGain(times, width, False)
    count = rule.verify_now([draft_of(copy=tokens(copied, chance)) for _ in range(rows)], 0, chance)
    held = [sum(chance**i for i in range(1, n + 1)) for n in range(16)]
    if count is None:
        draft = times.at_most(PassTimes.DRAFT)
        assert any(held[n] > n * draft + times.at_most(width(n)) - 1 for n in range(1, 16))
    else:
        assert held[count] >= times.at_most(width(count)) - 1 - 1e-9


def test_one_row_tries_what_it_does_not_know_and_a_batch_does_not():
    alone, batch = (ByGain(noted(DraftHistory(), rows, {1: 1.0}), width, False) for rows in (1, 8))
    assert steps_taken(alone, 0.7) > 0
    assert steps_taken(batch, 0.7, rows=8) == 0


def test_a_batch_waits_for_what_it_takes_without_drafts():
    rule = ByGain(DraftHistory().times_of(8, lambda: 0), width, False)
    copies = [draft_of(copy=tokens(15, 1.0)) for _ in range(8)]
    assert rule.verify_now(copies, 0, 1.0) == 0


def test_a_batch_tries_what_it_does_not_know_once_that_is_little_beside_its_time():
    """Two tokens of eight rows might take two passes, and the draft step another one."""
    rule = ByGain(noted(DraftHistory(), 8, {1: 1.0}), width, False)
    passes = 0
    while steps_taken(rule, 0.9, rows=8) == 0:
        rule.note(dict.fromkeys(range(8), 1), steps=0, width=1)
        passes += 1
    assert 300 < passes < 500


@given(
    st.integers(2, 8),
    st.floats(0.05, 1.0),
    st.lists(st.floats(1.0, 3.0), min_size=4, max_size=4),
    st.integers(0, 7),
    st.randoms(use_true_random=False),
)
def test_no_row_of_a_batch_falls_far_behind_whatever_drafts_were_thought_to_bring(rows, draft, wider, last, random):
    """One row's drafts never hold and the others' do by chance, all of which are thought to be sure: after so many
    passes' time, the last row has as many tokens, but for one pass and half a hundredth of them."""
    passes = dict(zip(WIDTHS, [1.0, *sorted(wider)], strict=True))
    rule = ByGain(noted(DraftHistory(), rows, {PassTimes.DRAFT: draft, **passes}), width, False)
    seconds, texts = 0.0, [0] * rows
    for _ in range(300):
        steps, count = steps_and_verified(rule, 0.95, rows=rows)
        seconds += steps * draft + passes[width(count)]
        kept = {row: 1 + (random.randint(0, count) if row != last % rows else 0) for row in range(rows)}
        texts = [text + kept[row] for row, text in enumerate(texts)]
        rule.note(kept, steps, width(count))
    assert seconds <= 1.005 * min(texts) + 1.01


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
