"""Steps that decide on the device are those that the host decides, to the bit, in one launch and without a wait.

The recorder replays the step's graph late and runs what stands behind a decision where that holds at that time
(`tools/recorder.py`). What is expected comes from the same compiled steps in a plain runner, which
asks the host. Tests marked `gpu` repeat the first ones with IF nodes of CUDA graphs.
"""

from __future__ import annotations

import gc
import itertools
import math
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import river_compile
from river_compile import CacheFullError, forced_threshold, report, river
from river_compile.capture.cuda import CudaGraphs
from river_compile.capture.device import CaptureFailed
from river_compile.capture.device_exit_state import stays_at
from river_compile.capture.device_exits import DeviceExits, DeviceWalk, WholeStep
from river_compile.exits import ALWAYS, CRITERIA, NEVER, bars_of
from river_compile.lowering.choose import Lowering
from river_compile.model_record import find_record
from river_compile.runtime.runner import PlainRunner, Step
from tests.support.captured import (
    CAPACITY,
    LAYERS,
    LEAVE,
    STAY,
    STEP,
    Decoder,
    assert_same,
    captured,
    capturing,
    check,
    run,
    uncaptured,
)
from tests.support.decoding import cache_argument, cache_state, decode, new_cache
from tests.support.families import SLIDING_WINDOW, make, prompt
from tests.support.lowerings import FUSED, lowered

_TAPED = {"quantizer": "rtn", "group_size": 32, "first_exit": 1, "launch_ahead": "device"}
NO_CARD = CudaGraphs.why_undecided(None) if torch.cuda.is_available() else None  # (no card is touched for it)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(NO_CARD), reason=str(NO_CARD))]),
]


class Deciding(Decoder):
    """A decoder whose steps decide on the device."""

    def __init__(self, name: str = "llama", device: str = "cpu", **options) -> None:
        super().__init__(name, device, launch_ahead="device", **options)

    @property
    def captured_units(self) -> list[str]:
        return [capture.unit for capture in self.log.captures]

    @property
    def events(self) -> list[str]:
        return [f"{e.what} {e.name}".strip() for e in self.runner.device.events]


@pytest.fixture(scope="module")
def shared() -> Deciding:
    return Deciding(compiled_prompts=True)


@pytest.fixture
def decoder(shared) -> Deciding:
    run(shared, [STAY])
    return shared


def ready(decoder: Deciding, batch: int = 1):
    """Returns a cache on which steps are replayed."""
    cache = decoder.start(batch=batch)
    for _ in range(3):
        decoder.step(cache, 4, threshold=2.0)
    decoder.runner.device.events.clear()
    return cache


def check_records(decoder: Decoder, steps) -> list[int]:
    """Compares steps with those that the host decides: bits, depths, scores, entropies, doubts; returns the depths."""
    with river_compile.trace() as actual:
        a = run(decoder, steps)
    with uncaptured(decoder.model), river_compile.trace() as expected:
        b = run(decoder, steps)
    assert_same(steps, b, a)
    ours, theirs = [[(s.depth, s.similarities, s.entropy, s.river_from) for s in t.steps] for t in (actual, expected)]
    assert repr(ours) == repr(theirs)  # (NaN is not equal to itself)
    return [step.depth for step in actual.tokens]


@torch.no_grad()
def generated(decoder: Decoder, taus) -> tuple[list, list]:
    """Generates after prompts that are shorter and longer than a window, one threshold after the other."""
    logits, caches = [], []
    for length in (4, SLIDING_WINDOW + 4):
        caches.append(new_cache(decoder.model, "static", CAPACITY))
        ids = prompt(length)
        for tau in taus:
            held = {cache_argument(decoder.model): caches[-1], "attention_mask": torch.ones_like(ids)}
            how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
            with forced_threshold(tau):
                out = decoder.model.generate(ids, **held, **how)
            logits += out.logits
            ids = out.sequences
    return logits, caches


class TestSameBits:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.slow
    def test_any_mix_of_depths_thresholds_and_caches(self, device):
        """Logits, entries, counters, depths and scores; everything but prompts is one graph for each cache."""
        decoder = Deciding(device=device)
        run(decoder, [STAY])

        @settings(max_examples=15)
        @given(st.lists(STEP, min_size=6, max_size=14))
        def try_out(steps):
            check_records(decoder, steps)

        try_out()
        assert isinstance(decoder.runner, DeviceExits)
        assert "step" in decoder.captured_units

    @pytest.mark.slow
    def test_a_batch_leaves_when_its_least_sure_row_may(self, fresh_dynamo):
        """Checks after every second block; depths without one can be forced all the same, in pieces."""
        decoder = Deciding(exit_every=2, first_exit=2)

        def run_all():
            caches = [decoder.start(seed, batch=batch) for seed, batch in enumerate((1, 3))]
            taus = [2.0, 2.0, 2.0, 2.0, -1.0, -1.0, *(0.5, 0.8, 0.9, 0.95) * 2]
            logits = [decoder.step(caches[i % 2], 3 + i, threshold=tau) for i, tau in enumerate(taus)]
            depths = [depth for depth in range(LAYERS + 1) for _ in range(2)] * 2
            return logits + [decoder.step(caches[0], 3 + i, depth) for i, depth in enumerate(depths)], caches

        with river_compile.trace() as seen:
            actual = run_all()
        with uncaptured(decoder.model), river_compile.trace() as asked:
            expected = run_all()
        assert_same([*range(40)], expected, actual)
        assert [(s.depth, s.similarities) for s in seen.steps] == [(s.depth, s.similarities) for s in asked.steps]
        units = {c.unit for g in report(decoder.model).graphs if g.kind == "decode" for c in g.captures.captures}
        assert units == {"step", "span 0-1", "tail 1", "span 0-3", "tail 3"}

    @pytest.mark.parametrize(
        ("name", "options", "taus"),
        [
            ("mixtral", {}, [2.0, 0.9, -1.0, 0.95, 2.0]),
            ("mistral", {}, [2.0, 0.9, -1.0, 0.95, 2.0]),
            ("mistral", {"criterion": "doubt"}, [4.0, 1e-9, 9.0, 1e-9, 4.0]),
        ],
    )
    @pytest.mark.slow
    def test_families(self, name, options, taus, fresh_dynamo):
        """Sliding windows before and after they are full, counters kept in Python, experts; what a doubt puts back."""
        decoder = Deciding(name, **options)
        generated(decoder, taus)  # (compiles)
        with river_compile.trace() as seen:
            actual = generated(decoder, taus)
        with uncaptured(decoder.model), river_compile.trace() as asked:
            expected = generated(decoder, taus)
        assert_same([*range(len(actual[0]))], expected, actual)
        assert [step[:2] + step[5:7] for step in seen.steps] == [step[:2] + step[5:7] for step in asked.steps]
        assert {1, LAYERS} <= {step.depth for step in seen.tokens}
        assert {c.unit for g in report(decoder.model).graphs for c in g.captures.captures} == {"step"}

    @pytest.mark.parametrize(
        ("criterion", "thresholds"), [("confidence", (0.0, 4.45, 5.0)), ("doubt", (0.0, 1e-9, 3.5, 4.0, 9.0))]
    )
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.slow
    def test_other_criteria(self, criterion, thresholds, device):
        """An entropy of the step before, which the host does not wait for, and a backbone that runs after the river."""
        decoder = Deciding(device=device, criterion=criterion)
        depths = check_records(decoder, [(i % 2, None, tau) for tau in thresholds * 2 for i in range(4)])
        assert set(depths) == {1, LAYERS}
        check_records(decoder, [(0, depth, None) for depth in (0, 1, 2, 2, LAYERS, 0, 1)])
        assert {"step", "span 0-2", "tail 2"} == set(decoder.captured_units)

    @pytest.mark.slow
    def test_checks_whose_kernels_decide(self, fresh_dynamo):
        """The generated kernels (in Triton's interpreter), a batch; forced depths, thresholds, and a NaN at the end."""
        decoder = Deciding(backend=lowered(FUSED), exit_every=2)

        def go():
            cache = decoder.start(batch=2)
            for i, (depth, tau) in enumerate(steps):
                logits.append(decoder.step(cache, 3 + i, depth, tau))
            return cache

        steps = [(None, tau) for tau in (2.0, 2.0, 0.9, -1.0, 0.95)] + [(0, None), (3, None), (1, None), (LAYERS, None)]
        steps += [(None, tau) for tau in (0.8, 0.97, 2.0)]
        logits: list[torch.Tensor] = []
        go()  # (compiles)
        assert [block.decides for block in captured(decoder.model)[-1].program.blocks] == [True, False, True, False]
        with river_compile.trace() as seen:
            caches = [go()]
        with uncaptured(decoder.model), river_compile.trace() as asked:
            caches += [go()]
        count = len(steps)
        assert_same(steps, (logits[count : 2 * count], caches[:1]), (logits[2 * count :], caches[1:]))
        assert [(s.depth, s.similarities) for s in seen.tokens] == [(s.depth, s.similarities) for s in asked.tokens]
        assert {0, 1, 3, LAYERS} == {s.depth for s in seen.tokens}
        assert set(decoder.captured_units) == {"step"}

    @pytest.mark.core
    @pytest.mark.slow
    def test_inductor(self):
        """Compiled segments, called without AOTAutograd's wrappers and with strides that they check."""
        decoder = Deciding(lowering="inductor", exit_every=2, first_exit=2)
        check(decoder, [STAY, STAY, LEAVE, LEAVE, STAY, LEAVE])
        assert set(decoder.captured_units) == {"step"}

    @pytest.mark.core
    @pytest.mark.slow
    def test_kernels_that_decide_among_inductors_code(self, fresh_dynamo):
        """Which clones nothing that they write, and is called without wrappers."""
        decoder = Deciding(lowering="triton", exit_every=2)
        steps = [(0, None, tau) for tau in (2.0, 2.0, 0.9, -1.0, 0.95, 0.9)] + [(0, 1, None), (0, None, 2.0)]
        assert set(check_records(decoder, steps)) >= {1, LAYERS}
        assert set(decoder.captured_units) == {"step"}
        (graph,) = [g for g in report(decoder.model).to_dict()["graphs"] if g["kind"] == "decode"]
        assert all(segment["direct"] for segment in graph["segments"])

    def test_a_compiled_depth_is_one_launch(self):
        decoder = Deciding(exit_depth=2)
        assert check_records(decoder, [(0, None, None)] * 5) == [2] * 5
        assert set(decoder.captured_units) == {"step"}

    @pytest.mark.slow
    def test_offloaded_blocks_that_no_token_reaches(self):
        """Every token leaves after two blocks at the latest."""
        decoder = Deciding(offload=2)
        taus = (2.0, 2.0, -1.0, 0.9, 2.0, -1.0)
        assert set(check_records(decoder, [(0, None, tau) for tau in taus])) == {1, 2}
        assert set(decoder.captured_units) == {"step"}

    @pytest.mark.slow
    def test_exact_mode_drafts_with_it(self):
        decoder = Deciding()
        model, ids = decoder.model, torch.arange(2, 8)[None]
        settings_ = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        plain = make("llama", layers=LAYERS).generate(ids, **settings_)
        cache = new_cache(model, "static", CAPACITY)
        model.generate(ids, **settings_, **{cache_argument(model): cache})
        assert set(decoder.captured_units) == {"step"}
        cache.reset()
        held = {cache_argument(model): cache, "custom_generate": river_compile.exact}
        exact = model.generate(ids, **settings_, **held, adaptive=False)
        assert torch.equal(exact, plain)
        assert set(decoder.captured_units) == {"step"}


class TestOrder:
    """What is launched and awaited when, as the recorder saw it."""

    @pytest.mark.parametrize("tau", [2.0, -1.0])
    def test_one_launch_and_no_wait_whatever_the_depth(self, decoder, tau):
        """A copy before it, of inputs, and of the rule where that is another one; two after it: outcome, results."""
        cache = ready(decoder)
        for other in (tau != 2.0, False):
            decoder.runner.device.events.clear()
            decoder.step(cache, 5, threshold=tau)
            step = decoder.events[: decoder.events.index("end") + 1]
            assert step == ["run", *["run"] * other, "launch step", "run", "run", "end"]

    def test_a_step_is_read_when_the_next_one_has_been_launched(self, decoder):
        cache = ready(decoder)
        stats = find_record(decoder.model).exit_stats
        before = stats.decode.total()
        decoder.runner.device.events.clear()
        for _ in range(3):
            decoder.step(cache, 5, threshold=2.0)
        seen = [event for event in decoder.events if event != "run"]
        assert seen == ["launch step", "end", "launch step", "end", "wait step", "launch step", "end", "wait step"]
        assert stats.decode.total() == before + 3  # who asks waits
        assert decoder.events[-1] == "wait step"

    def test_whoever_observes_steps_is_told_at_once(self, decoder):
        cache = ready(decoder)
        with river_compile.trace() as seen:
            decoder.step(cache, 5, threshold=-1.0)
            assert [step.depth for step in seen.tokens] == [1]

    def test_every_segment_has_run_before_the_capture(self, monkeypatch):
        """A capture can load no kernel. What was rehearsed is taken back."""
        decoder = Deciding(criterion="doubt")
        cache, ran, run_as = decoder.start(), set(), Step.run_as
        monkeypatch.setattr(Step, "run_as", lambda step, *args: (ran.add(step.segment), run_as(step, *args))[1])
        decoder.step(cache, 3, threshold=9.0)
        first = set(ran)
        missing: list = []
        device, capture = decoder.runner.device, decoder.runner.device.capture
        reachable = set(decoder.runner.steps)

        def look(unit, *args):
            device.settle()
            missing.extend(reachable - ran)
            return capture(unit, *args)

        monkeypatch.setattr(device, "capture", look)
        ran.clear()
        decoder.step(cache, 3, threshold=9.0)
        assert decoder.captured_units == ["step"]
        assert first < reachable
        assert missing == []


def launches_of_forks(decoder: Deciding, monkeypatch) -> list[list[str]]:
    """Takes a step that never leaves; returns what each fork launches before its two nodes and what sets them.

    That is what follows the kernel of the score, or where there is none the last kernel of a block.
    """
    cache, launched = ready(decoder), []
    decoder.runner.device.settle()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view and not {"detach", "_local_scalar_dense"} & {function._opname}:
                launched.append(function._opname)
            return function(*args, **(kwargs or {}))

    def watched(walk, *args) -> None:
        with Watch():  # (around the whole model it would keep Dynamo away)
            call(walk, *args)

    device, run, call = decoder.runner.device, PlainRunner.blocks, WholeStep.run_into
    when = device.when
    monkeypatch.setattr(WholeStep, "run_into", watched)
    monkeypatch.setattr(PlainRunner, "blocks", lambda *args: (run(*args), launched.append("ran")))
    monkeypatch.setattr(device, "when", lambda *args: (launched.append("when"), when(*args)))
    decoder.step(cache, 5, threshold=2.0)
    return [fork.rpartition("ran")[2].split() for fork in " ".join(launched).split("when when")[:-1]]


class TestLaunches:
    """What docs/cuda.md counts for a fork."""

    COMPARED = ("_foreach_copy_", "fmax", "le", "logical_not")

    def test_a_fork_whose_check_decides_launches_nothing_more(self, monkeypatch):
        """Before, it launched four kernels beside its score; so does still the fork at depth 0, which has none."""
        decoder = Deciding(backend=lowered(FUSED), exit_every=2)
        assert launches_of_forks(decoder, monkeypatch) == [[*self.COMPARED], [], []]

    @pytest.mark.slow
    def test_a_fork_with_a_score_of_another_kernel_launches_four(self, monkeypatch):
        assert launches_of_forks(Deciding(), monkeypatch) == [[*self.COMPARED]] * LAYERS

    @pytest.mark.slow
    def test_criteria_that_ask_no_block_pay_for_none(self, monkeypatch):
        decoder = Deciding(backend=lowered(FUSED), criterion="confidence")
        assert launches_of_forks(decoder, monkeypatch) == [[*self.COMPARED]] * 2
        assert not any(block.decides for block in captured(decoder.model)[-1].program.blocks)


class TestStaleness:
    """The recorder can fail: it notices what a GPU would get wrong in silence."""

    def test_results_that_a_branch_does_not_hand_over_are_no_numbers(self, decoder, monkeypatch):
        cache = ready(decoder)
        assert decoder.step(cache, 5, threshold=-1.0).isfinite().all()
        monkeypatch.setattr(DeviceWalk, "hand_over", lambda walk, slots: None)
        assert decoder.step(cache, 5, threshold=-1.0).isnan().all()

    def test_what_a_branch_made_is_no_number_outside_of_it(self, decoder, monkeypatch):
        """Results copied after the decision, from where the branch left them."""
        cache, left = ready(decoder), []
        hand_over = DeviceWalk.hand_over

        def keep(walk, slots):
            hand_over(walk, slots)
            left.append(slots)

        monkeypatch.setattr(DeviceWalk, "hand_over", keep)
        decoder.step(cache, 5, threshold=-1.0)
        (slots,) = left
        logits = [slots[i] for i in decoder.runner.step.writes if slots[i].is_floating_point()]
        assert logits
        assert all(value.isnan().all() for value in logits)

    def test_an_outcome_is_taken_once(self, decoder):
        """The place in host memory holds no number until the next step has written there."""
        cache = ready(decoder)
        with river_compile.trace():
            decoder.step(cache, 5, threshold=-1.0)
        place, _ = decoder.runner._outcomes._places[-1]
        assert place.isnan().all()
        place, reading = decoder.runner._outcomes._places[0]
        assert reading is None or not math.isnan(reading()[-1])


class TestBars:
    """A device compares with a bar as the host does, and as the criteria are described."""

    NUMBERS = (math.nan, -math.inf, math.inf, -1.0, 0.0, 0.7, 1.0, float(torch.tensor(0.7)))

    @pytest.mark.parametrize(("score", "threshold"), [*itertools.product(NUMBERS, NUMBERS)])
    def test_scores_are_compared_as_the_host_does(self, bars_with, score, threshold):
        bars, score = bars_with("similarity", threshold), torch.tensor(score)
        leaves = score.item() > threshold
        assert bars.leaves(1, score.item()) is leaves
        assert self.leaves_on_device(score, bars.bars[1]) is leaves
        assert self.leaves_on_device(score, ALWAYS)
        assert not self.leaves_on_device(score, NEVER)

    @pytest.mark.parametrize(("entropy", "threshold"), [*itertools.product(NUMBERS, NUMBERS)])
    def test_entropies_are_compared_as_the_host_does(self, bars_with, entropy, threshold):
        bars, score = bars_with("confidence", threshold), -torch.tensor(entropy)
        leaves = torch.tensor(entropy).item() < threshold
        assert bars.leaves(1, score.item()) is leaves
        assert self.leaves_on_device(score, bars.bars[1]) is leaves
        bars = bars_with("doubt", threshold)
        assert bars.bars[1] is (ALWAYS if threshold > 0 else NEVER)
        if threshold > 0:
            assert bars.leaves(LAYERS, score.item()) is leaves
            assert self.leaves_on_device(score, bars.bars[LAYERS]) is leaves

    @staticmethod
    def leaves_on_device(score, bar):
        return not stays_at(score, torch.tensor(bar, dtype=torch.float64)).item()

    @pytest.fixture
    def bars_with(self, decoder):
        executor = captured(decoder.model)[-1]

        def bars(criterion, threshold):
            policy = replace(executor.policy, criterion=CRITERIA[criterion], threshold=threshold)
            return bars_of(policy, executor.program.candidates, LAYERS)

        return bars

    def test_a_criterion_of_ones_own_is_asked_on_the_host(self, decoder):
        """It may decide in any way, whatever it is derived from."""

        class Odd(type(CRITERIA["similarity"])):
            def leaves(self, depth, score, threshold):
                return depth == 3

        cache, executor = ready(decoder), captured(decoder.model)[-1]
        before, executor.policy = executor.policy, replace(executor.policy, criterion=Odd())
        with river_compile.trace() as seen:
            decoder.step(cache, 5)
        executor.policy = before
        assert [step.depth for step in seen.tokens] == [3]

    @pytest.mark.slow
    def test_no_number_never_leaves_but_where_a_depth_is_forced(self):
        decoder = Deciding(quantizer="none")
        run(decoder, [STAY])
        with torch.no_grad():
            decoder.model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
        cache = decoder.start()
        with river_compile.trace() as seen:
            for depth in (None, None, None, 1, 1, 0, None):
                decoder.step(cache, 5, depth, threshold=-1.0)
        assert [step.depth for step in seen.tokens] == [LAYERS, LAYERS, LAYERS, 1, 1, 0, LAYERS]
        assert all(math.isnan(score) for score in seen.tokens[2].similarities)
        assert len(seen.tokens[2].similarities) == LAYERS - 1
        assert "step" in decoder.captured_units


class TestCaches:
    @pytest.mark.slow
    def test_a_replaced_cache_is_captured_anew_and_let_go(self):
        """The decoder is the test's own: a cache at the addresses of an earlier, freed one would be replayed on."""
        decoder = Deciding()
        run(decoder, [STAY])
        caches = [decoder.start(seed) for seed in range(2)]
        for cache in caches:
            before = decoder.log.made
            for _ in range(3):
                decoder.step(cache, 4, depth=1)
            assert decoder.log.made == before + 1
        gone = [weakref.ref(layer.keys) for cache in caches for layer in cache.layers]
        del caches, cache
        gc.collect()
        assert [ref() for ref in gone] == [None] * 2 * LAYERS

    def test_other_rules_and_forced_depths_need_no_capture(self, decoder):
        """One graph for a cache; its memory is that of what was asked for, and no tail's is kept beside it."""
        cache = ready(decoder)
        made = decoder.log.made
        for i, tau in enumerate((2.0, -1.0, 0.5, 0.9, (2.0, -1.0), (0.9, 0.8, -1.0))):
            decoder.step(cache, 3 + i, threshold=tau)
        with river_compile.trace() as seen:
            for depth in (*range(LAYERS + 1), 1, 0):
                decoder.step(cache, 3, depth)
        assert [step.depth for step in seen.tokens] == [0, 1, 2, 3, 4, 1, 0]
        assert decoder.log.made == made

    def test_a_full_cache_is_an_error_before_anything_is_written(self, decoder):
        full, free = decoder.start(0), decoder.start(1)
        stats = find_record(decoder.model).exit_stats
        counted = stats.decode.total()
        for _ in range(CAPACITY - 6):
            decoder.step(full, 4, threshold=-1.0)
        before = [[t.clone() if isinstance(t, torch.Tensor) else t for t in layer] for layer in cache_state(full)]
        with pytest.raises(CacheFullError, match="holds 40 tokens; 40 are filled"):
            decoder.step(full, 4, threshold=-1.0)
        for a, b in zip(before, cache_state(full), strict=True):
            assert all(map(torch.equal, map(torch.as_tensor, a), map(torch.as_tensor, b)))
        assert decoder.step(free, 4, threshold=-1.0).isfinite().all()
        assert stats.decode.total() == counted + CAPACITY - 6 + 1

    def test_a_step_that_fails_is_forgotten(self, decoder, monkeypatch):
        """The rule that it brought may not have arrived; the next step brings its own. The one before still counts."""
        cache = ready(decoder)
        counted = find_record(decoder.model).exit_stats.decode.total()
        decoder.step(cache, 5, threshold=2.0)
        counted += 1
        finish = decoder.runner.finish
        monkeypatch.setattr(decoder.runner, "finish", lambda slots: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.step(cache, 5, threshold=-1.0)
        monkeypatch.setattr(decoder.runner, "finish", finish)
        with river_compile.trace() as seen:
            for tau in (-1.0, 2.0, -1.0):
                decoder.step(cache, 5, threshold=tau)
        assert [step.depth for step in seen.tokens] == [1, LAYERS, 1]
        assert find_record(decoder.model).exit_stats.decode.total() == counted + 3


def test_threads_never_mix_their_results(decoder):
    """Two threads decode on caches of their own at once: each gets the bits and depths that it gets alone."""
    taus = [2.0, 2.0, -1.0, -1.0, 0.9, 2.0, -1.0, 0.9, 2.0, -1.0]

    def go(cache, seed, out):
        out += [decoder.step(cache, 3 + seed + i, threshold=tau) for i, tau in enumerate(taus)]

    alone: list[list] = [[], []]
    with river_compile.trace() as before:
        for seed in range(2):
            go(decoder.start(seed), seed, alone[seed])
    together: list[list] = [[], []]
    caches = [decoder.start(seed) for seed in range(2)]
    threads = [threading.Thread(target=go, args=(caches[s], s, together[s])) for s in range(2)]
    stats = find_record(decoder.model).exit_stats
    counted = stats.decode.copy()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert len(b) == len(taus)
        assert all(map(torch.equal, a, b))
    counted.update(step.depth for step in before.tokens)
    assert stats.decode == counted


class TestReported:
    """What stays with the host, and why."""

    @pytest.mark.slow
    def test_a_capture_that_fails_leaves_the_host_to_decide(self):
        decoder = Deciding()
        decoder.step(decoder.start(), 3, threshold=2.0)
        device, tries = decoder.runner.device, []
        capture = device.capture

        def fail(unit, slots, outputs, buffer):
            if unit.name == "step":
                tries.append(unit)
                raise CaptureFailed("operation not supported")
            return capture(unit, slots, outputs, buffer)

        device.capture = fail
        check_records(decoder, [STAY, STAY, LEAVE, LEAVE, (0, 0, None), (0, 0, None), STAY])
        assert decoder.log.uncaptured_units["step"] == "operation not supported"
        assert {"span 0-1", "tail 1"} <= set(decoder.captured_units)
        assert len(tries) == 1
        assert "uncaptured   step: operation not supported" in str(report(decoder.model))

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"offload": 2, "offload_policy": "fetch"}, "offloaded weights lie elsewhere in every run"),
        ],
    )
    @pytest.mark.slow
    def test_what_no_graph_decides(self, options, why):
        decoder = Deciding(**options)
        check_records(decoder, [(0, None, tau) for tau in (2.0, 2.0, 0.9, 0.9, -1.0, -1.0)])
        assert why in decoder.log.uncaptured_units["step"]
        assert "span 0-1" in decoder.captured_units

    @pytest.mark.slow
    def test_tapes_decide_nothing(self):
        """On a CPU a replay has run when it returns, and there is nothing to wait for."""
        model = make("llama", layers=2)
        model.compile(backend=lowered(Lowering("eager", "native", fuse=True)), options=_TAPED)
        decode(model, new_cache(model, "static"), [None])
        log = report(model).graphs[-1].captures
        assert log.uncaptured_units["step"] == "tapes of C++ calls hold no decisions"

    @pytest.mark.slow
    def test_a_growing_mask_leaves_the_host_to_decide(self, fresh_dynamo):
        """Hand-fed 2-D masks change their length with every token: later spans are captured, the step is not."""
        model = make("llama", layers=LAYERS)
        model.compile(backend=river, options=capturing(launch_ahead="device"))
        depths = [2, 2, 2, 2, 2, 2, None, None]
        caches = [new_cache(model, "static") for _ in range(2)]
        actual = decode(model, caches[0], depths, plain_prompt=True)
        with uncaptured(model):
            expected = decode(model, caches[1], depths, plain_prompt=True)
        assert_same(["prompt", *depths], (expected, caches[1:]), (actual, caches[:1]))
        log = report(model).graphs[-1].captures
        assert "tail 2" in [c.unit for c in log.captures]
        assert "attention_mask" in log.uncaptured_units["step"]

    def test_captures_are_bounded(self, decoder):
        launcher = decoder.runner.launcher
        bound, launcher.max_captures = launcher.max_captures, 1
        check(decoder, [(i % 2, None, tau) for i, tau in enumerate((2.0, 2.0, 2.0, 2.0, -1.0, -1.0, 0.9))])
        assert decoder.log.alive == 1
        launcher.max_captures = bound


def test_executor_buffers_and_graphs_go_with_their_model_though_no_step_was_read(fresh_dynamo):
    decoder = Deciding()
    run(decoder, [(0, 1, None)] * 3)
    executor = weakref.ref(captured(decoder.model)[-1])
    buffers = [weakref.ref(buffer) for buffer in executor().runner._buffers()]
    assert len(buffers) > 2
    del decoder
    torch._dynamo.reset()
    gc.collect()
    assert executor() is None
    assert not any(ref() is not None for ref in buffers)
