"""Exact mode does without drafts where they cost more than they save, and tries again: on a scripted clock."""

import pytest
import torch

from river_compile.reporting.report import Report, token_lines
from river_compile.runtime.stats import CycleRecord, ExitStats, PayoffLog, RowCycle
from river_compile.speculative.accept import Chooser
from river_compile.speculative.draft import Drafter
from river_compile.speculative.loop import ExactLoop
from river_compile.speculative.pays import Pays
from river_compile.speculative.plan import ByChance
from river_compile.speculative.texts import Texts
from tests.support.scripted import ScriptedRunner

PROMPT = torch.tensor([[3, 1, 4]])


class Device(ScriptedRunner):
    """A scripted model whose passes take scripted seconds; drafting may become cheaper or dearer with the text."""

    def __init__(self, draft_seconds, new_tokens):
        super().__init__(PROMPT, 5, 7, max_draft=3, capacity=new_tokens + 20, memory=99)
        self.now, self.draft_seconds = 0.0, draft_seconds

    def draft_step(self, ids_BS):
        self.now += self.draft_seconds(ids_BS.shape[1])
        return super().draft_step(ids_BS)

    def verify(self, ids_BS, drafted):
        self.now += 1.0
        return super().verify(ids_BS, drafted)


def generate(draft_seconds, new_tokens=600, do_sample=False, watched=True):
    """Returns the text, the number of drafted tokens of each cycle, and what was noted."""
    device, log, cycles = Device(draft_seconds, new_tokens), PayoffLog(), []
    device.stats.count_cycle = cycles.append
    pays = Pays(log, lambda: 0, clock=lambda: device.now)
    longest = PROMPT.shape[1] + new_tokens
    drafter = Drafter(PROMPT, False, ByChance(0.3, device.width_for), device.times, together=True, pad_token=0)
    loop = ExactLoop(
        runner=device, drafter=drafter, texts=Texts(PROMPT, None), chooser=Chooser(1, do_sample), process=None,
        process_draft=None, stops=lambda ids, scores: torch.full((1,), ids.shape[1] >= longest), together=True,
        max_length=longest, pad_token=None, pays=pays if watched else None, clock=lambda: device.now,
    )  # fmt: skip
    first = torch.stack([device.logits(row) for row in PROMPT.tolist()])[:, None]
    return loop.run(first), [len(cycle.drafted) for cycle in cycles], log


def test_cheap_drafts_go_on():
    _, drafted, log = generate(lambda length: 0.01)
    assert all(drafted[:-1])
    assert (log.times_off, log.tokens_without) == (0, 0)
    assert log.seconds[0] < log.seconds[1] == 1.0


def test_dear_drafts_are_left_out_for_longer_and_longer():
    """The text is the same; of 600 tokens most come without drafts, and the report's numbers say why."""
    text, drafted, log = generate(lambda length: 5.0)
    assert torch.equal(text, generate(lambda length: 0.01)[0])
    rests = [len(run) for run in "".join("." if n else "x" for n in drafted).split(".") if run]
    assert rests[:3] == [64, 128, 256]
    assert log.times_off >= 3
    assert log.tokens_without == sum(rests)
    assert log.why[0] > 1.1 * log.why[1] == pytest.approx(1.1)


def test_drafts_come_back_when_they_pay_again():
    """Drafting is dear only at the beginning, as with another program on the device; the next rest is short again."""
    _, drafted, log = generate(lambda length: 5.0 if length < 60 else 0.01)
    assert log.times_off == 1
    assert 0 in drafted
    assert all(drafted[-20:-1])
    assert log.tokens_without == 64


def test_measuring_a_plain_step_changes_no_text_and_no_sampled_one():
    """Watched and unwatched, greedy and sampled."""
    for do_sample in (False, True):
        texts = []
        for watched in (True, False):
            torch.manual_seed(0)
            texts.append(generate(lambda length: 0.01, 200, do_sample, watched=watched)[0])
        assert torch.equal(*texts)


def test_a_sampled_text_does_not_depend_on_drafts_that_are_left_out():
    texts = []
    for seconds in (5.0, 0.01):
        torch.manual_seed(0)
        text, drafted, _ = generate(lambda length, each=seconds: each, 200, do_sample=True)
        texts.append(text)
        assert all(drafted[:-1]) == (seconds < 1)
    assert torch.equal(*texts)


def cycle(kept=2, width=4, seconds=1.0, drafted=1):
    row = RowCycle(0, ("river",) * drafted, ("river",) * kept)
    return CycleRecord((row,), width, (seconds, 0.0, 0.0), thread=0, model=0)


def test_cycles_that_compile_or_use_a_new_width_do_not_count():
    """Neither do those between which another graph came; one slow cycle in a window is a stumble."""
    graphs, log = [1], PayoffLog()
    pays = Pays(log, lambda: graphs[0], clock=iter(range(1000)).__next__)
    for _ in range(8):  # each compiles
        graphs[0] += 1
        pays.note(cycle(seconds=100.0))
    pays.measure_plain(lambda: None)
    assert log.seconds is None
    pays.note(cycle(seconds=100.0))
    for _ in range(8):
        pays.note(cycle(seconds=1.0))
        pays.measure_plain(lambda: None)
    assert log.seconds == (0.5, 1)
    assert not pays.resting


def test_the_report_tells_when_drafts_were_left_out():
    stats = ExitStats()
    stats.payoff.times_off, stats.payoff.tokens_without, stats.payoff.why = 2, 192, (0.0312, 0.0271)
    stats.decode[3] = 1
    report = Report("M", ("graph",), (), 0.0, (0, 0), {3: 1}, {}, stats.exact, stats.payoff)
    lines = "\n".join(token_lines(report))
    assert "drafts off   2 times, for 192 tokens: a kept token took" in lines
    assert "31.2 ms, a plain step 27.1 ms" in lines
