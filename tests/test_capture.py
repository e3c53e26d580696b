"""Captured decode steps are the uncaptured ones, to the bit, whatever the order of replays.

The recorder stands in for CUDA graphs: it runs launches late, spoils every value that a real replay would not have
written, and refuses to replay on inputs that have moved (`river_compile/capture_recorder.py`). The tests marked `gpu`
repeat the main ones with CUDA graphs, and look at the device's memory.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

import river_compile
from river_compile import CacheFullError, OptionError, RiverConfig, capture_choice, report, river
from river_compile.capture import CaptureFailed
from river_compile.capture_recorder import Recorder, StaleReplay
from river_compile.captured_executor import CapturedExecutor
from river_compile.launch_ahead import LaunchAhead
from river_compile.runtime import forced_depth, forced_threshold
from tests.decoding import cache_argument, cache_state, decode, new_cache
from tests.families import make, prompt

LAYERS = 4
CAPACITY = 40
OPTIONS = {"lowering": "eager", "quantizer": "rtn", "group_size": 32, "first_exit": 1}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def capturing(device: str, **options) -> dict[str, object]:
    return {**OPTIONS, "cudagraphs": "record" if device == "cpu" else True, **options}


class Decoder:
    """A tiny model, compiled, that takes steps on caches it made, always through the same two graphs.

    The mask covers the whole cache, as generate makes it, so that no input changes its size.
    """

    def __init__(self, name: str = "llama", device: str = "cpu", batch: int = 1, **options) -> None:
        self.model = make(name, layers=LAYERS).to(device)
        self.model.compile(backend=river, options=options)
        self.device, self.batch = device, batch

    def start(self, seed: int = 0, capacity: int = CAPACITY) -> StaticCache:
        """Returns a new cache with a prompt of 6 tokens in it."""
        cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        self._call(cache, prompt(6, self.batch, seed), 0)
        return cache

    def step(self, cache: StaticCache, token: int, depth: int | None = None, threshold: float | None = None):
        """Feeds a token and returns its logits: at a forced depth, with a forced threshold, or as compiled."""
        ids = torch.full((self.batch, 1), token)
        filled = int(cache.get_seq_length())
        if depth is not None:
            with forced_depth(depth):
                return self._call(cache, ids, filled)
        if threshold is not None:
            with forced_threshold(threshold):
                return self._call(cache, ids, filled)
        return self._call(cache, ids, filled)

    @torch.no_grad()
    def _call(self, cache, ids, filled):
        length = ids.shape[1]
        slots = torch.arange(cache.get_max_length())
        position = torch.arange(filled, filled + length)
        mask = (slots[None, :] <= position[:, None])[None, None].expand(self.batch, 1, -1, -1)
        held = {"use_cache": True, cache_argument(self.model): cache}
        tensors = {"input_ids": ids, "attention_mask": mask.contiguous(), "position_ids": position[None]}
        return self.model(**{k: v.to(self.device) for k, v in tensors.items()}, **held).logits

    @property
    def graph(self):
        """What the report knows of the decode graph."""
        (record,) = [g for g in report(self.model).graphs if g.kind == "decode"]
        return record


def assert_same(steps, expected, actual) -> None:
    """Compares logits and caches of two runs to the bit."""
    for place, (a, b) in enumerate(zip(expected[0], actual[0], strict=True)):
        assert torch.equal(a, b), f"logits of step {place}, {steps[place]}"
    for a, b in zip(expected[1], actual[1], strict=True):
        for layer, (x, y) in enumerate(zip(cache_state(a), cache_state(b), strict=True)):
            assert torch.equal(x[0], y[0]), f"keys of layer {layer}"
            assert torch.equal(x[1], y[1]), f"values of layer {layer}"
            assert x[2] == y[2], f"length of layer {layer}"


def run(decoder: Decoder, steps) -> tuple[list, list]:
    """Takes steps (cache number, depth or None, threshold or None) on caches that were started up front."""
    caches = [decoder.start(seed) for seed in range(2)]
    logits = [decoder.step(caches[c], 3 + i, depth, tau) for i, (c, depth, tau) in enumerate(steps)]
    return logits, caches


STEP = st.tuples(
    st.integers(0, 1),
    st.one_of(st.none(), st.integers(0, LAYERS)),
    st.sampled_from([None, -1.0, 0.5, 0.8, 0.9, 0.95, 2.0]),
)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _many_models():
    """A test's models share the code of their class, and Dynamo limits the graphs of one code."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.fixture
def executors(monkeypatch) -> list[CapturedExecutor]:
    """The capturing executors that the test makes, in order."""
    made = []

    def make_one(*args):
        made.append(CapturedExecutor(*args))
        return made[-1]

    monkeypatch.setattr(capture_choice, "CapturedExecutor", make_one)
    return made


class TestSameBits:
    """What a captured decoder computes is what the uncaptured one computes."""

    @pytest.mark.parametrize("ahead", [False, True], ids=["in order", "ahead"])
    def test_any_mix_of_depths_and_caches(self, device, ahead):
        """Two caches in turn, forced depths, thresholds in between: logits, entries and counters."""
        plain = Decoder(device=device, **OPTIONS, cudagraphs=False)
        captured = Decoder(device=device, **capturing(device, launch_ahead=ahead))

        @settings(max_examples=12, deadline=None, derandomize=True)
        @given(st.lists(STEP, min_size=6, max_size=14))
        def check(steps):
            assert_same(steps, run(plain, steps), run(captured, steps))

        check()
        assert captured.graph.captures.captures

    @pytest.mark.parametrize(
        ("criterion", "thresholds"),
        [("history", (2.0, 0.9, -2.0)), ("confidence", (0.0, 3.5, 4.0)), ("doubt", (0.0, 1e-9, 3.5, 4.0, 9.0))],
    )
    def test_other_criteria(self, device, criterion, thresholds):
        """What is remembered between tokens, entropies, and a backbone that runs behind the river."""
        options = {"criterion": criterion, "first_exit": 2}
        steps = [(i % 2, None, tau) for tau in thresholds * 2 for i in range(6)]
        plain = Decoder(device=device, **{**OPTIONS, **options}, cudagraphs=False)
        captured = Decoder(device=device, **{**capturing(device), **options})
        with river_compile.trace() as expected:
            a = run(plain, steps)
        with river_compile.trace() as actual:
            b = run(captured, steps)
        assert_same(steps, a, b)
        assert [(s.depth, s.similarities) for s in actual.steps] == [(s.depth, s.similarities) for s in expected.steps]
        assert len({s.depth for s in actual.tokens}) > 1
        assert {c.unit for c in captured.graph.captures.captures} >= {"tail 2"}

    @pytest.mark.parametrize("name", ["gemma2", "mistral", "phi", "gpt2", "falcon_gqa", "mixtral", "olmo2"])
    def test_families(self, name):
        """Sliding windows (before and after they are full), counters in Python, experts, parallel blocks."""
        steps = [(0, None, tau) for tau in (2.0, 2.0, -1.0, -1.0, 0.9, 2.0, 2.0, 0.9, 0.95, -1.0)]
        plain = Decoder(name, **OPTIONS)
        captured = Decoder(name, **capturing("cpu", launch_ahead=True))
        assert_same(steps, run(plain, steps), run(captured, steps))
        assert any(g.captures.captures for g in report(captured.model).graphs)

    def test_inductor(self, device):
        """Compiled segments, called without AOTAutograd's wrappers, replay as well."""
        options = {**OPTIONS, "lowering": "inductor"}
        steps = [(0, None, tau) for tau in (2.0, 2.0, -1.0, -1.0, 2.0, -1.0)]
        plain = Decoder(device=device, **options, cudagraphs=False)
        captured = Decoder(device=device, **{**capturing(device), **options})
        assert_same(steps, run(plain, steps), run(captured, steps))

    def test_sizes_that_change_between_caches(self, device):
        """A second cache of another length makes Dynamo trace with dynamic sizes: captures are told apart by them."""

        def run_all(decoder):
            caches = [decoder.start(seed, capacity) for seed, capacity in enumerate((40, 24, 32))]
            return [decoder.step(caches[i % 3], 3 + i, threshold=(2.0, -1.0)[i // 3 % 2]) for i in range(18)], caches

        plain = Decoder(device=device, **OPTIONS, cudagraphs=False)
        captured = Decoder(device=device, **capturing(device, launch_ahead=True))
        assert_same([*range(18)], run_all(plain), run_all(captured))
        assert sum(len(g.captures.captures) for g in report(captured.model).graphs) > 8

    def test_exact_mode(self):
        """Drafts at depth 0 and single tokens at the last depth are captured; the text stays the plain model's."""
        ids = prompt()
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
        plain, captured = make("llama", layers=LAYERS), make("llama", layers=LAYERS)
        captured.compile(backend=river, options=capturing("cpu"))
        cache = StaticCache(config=captured.config, max_cache_len=CAPACITY)
        actual = captured.generate(ids, **settings, cache=cache, custom_generate=river_compile.exact)
        assert torch.equal(actual, plain.generate(ids, **settings))
        units = {c.unit for g in report(captured).graphs for c in g.captures.captures}
        assert {"piece 0-0", "tail 0"} <= units


class TestOrder:
    """What is launched when, as the recorder saw it."""

    def events(self, executors, decoder, cache, tau):
        executors[0].device.events.clear()
        decoder.step(cache, 5, threshold=tau)
        return [f"{e.what} {e.name}".strip() for e in executors[0].device.events if e.what != "run"]

    def test_in_order_every_flag_is_awaited_before_the_next_launch(self, executors):
        decoder = Decoder(**capturing("cpu", launch_ahead=False))
        cache = decoder.start()
        for tau in (2.0, 2.0, -1.0, -1.0):
            decoder.step(cache, 4, threshold=tau)
        pieces = ["piece 0-1", "piece 1-2", "piece 2-3"]
        never = [f"{what} {piece}" for piece in pieces for what in ("launch", "wait")]
        assert self.events(executors, decoder, cache, 2.0) == [*never, "launch last 3-4", "end"]
        assert self.events(executors, decoder, cache, -1.0) == [*never[:2], "launch tail 1", "end"]

    def test_ahead_the_next_piece_is_launched_before_the_flag_is_awaited(self, executors):
        decoder = Decoder(**capturing("cpu", launch_ahead=True))
        cache = decoder.start()
        for tau in (2.0, 2.0, -1.0, -1.0):
            decoder.step(cache, 4, threshold=tau)
        start = ["launch piece 0-1", "launch piece 1-2", "wait piece 0-1"]
        assert self.events(executors, decoder, cache, -1.0) == [*start, "launch tail 1", "end"]
        rest = ["launch piece 2-3", "wait piece 1-2", "launch last 3-4", "wait piece 2-3", "end"]
        assert self.events(executors, decoder, cache, 2.0) == [*start, *rest]

    def test_a_piece_launched_ahead_gives_its_counters_back(self, executors, monkeypatch):
        """Without that the twins would write one slot too far; the comparison of caches sees it."""
        steps = [(0, None, tau) for tau in (2.0, 2.0, -1.0, -1.0, -1.0)]
        plain = run(Decoder(**OPTIONS), steps)
        monkeypatch.setattr(CapturedExecutor, "_take_back", lambda *_: None)
        with pytest.raises(AssertionError, match="logits of step 2"):
            assert_same(steps, plain, run(Decoder(**capturing("cpu", launch_ahead=True)), steps))

    def test_rolling_caches_are_not_launched_ahead(self):
        """A full sliding window moves its entries, which cannot be done twice; the report names the line."""
        decoder = Decoder("mistral", **capturing("cpu", launch_ahead=True))
        cache = decoder.start()
        for _ in range(6):
            decoder.step(cache, 5, threshold=2.0)
        text = str(report(decoder.model))
        assert "piece 1-2 is not launched ahead: it changes a value otherwise than by writing to a slot" in text
        assert "cache_utils.py:" in text


class TestStaleness:
    """The recorder can fail: it notices what a GPU would get wrong in silence."""

    def ready(self, executors, **options):
        decoder = Decoder(**capturing("cpu", **options))
        cache = decoder.start()
        for tau in (2.0, 2.0, -1.0, -1.0):
            decoder.step(cache, 4, threshold=tau)
        return decoder, cache, executors[0]

    def test_a_replay_on_moved_inputs_is_refused(self, executors):
        _, _, executor = self.ready(executors)
        graph = next(iter(executor._captures.values())).graph
        registers = [torch.zeros(1) if i in graph.unit.keys else None for i in range(executor.size)]
        with pytest.raises(StaleReplay, match="has moved since the capture"):
            executor.device.launch(graph, registers)

    def test_a_buffer_that_nobody_wrote_in_this_step_is_no_number(self, executors, monkeypatch):
        """A tail whose piece was left out reads an earlier token's hidden state: NaN here."""
        decoder, cache, _ = self.ready(executors)
        assert decoder.step(cache, 5, threshold=-1.0).isfinite().all()
        launch = CapturedExecutor._launch

        def leave_out(self, unit, registers):
            if unit.name == "piece 0-1":
                for index in unit.writes:
                    registers[index] = next(reversed(self._buffers[index].values()))
                self.flags[1] = 1.0
                return True
            return launch(self, unit, registers)

        monkeypatch.setattr(CapturedExecutor, "_launch", leave_out)
        assert decoder.step(cache, 5, threshold=-1.0).isnan().all()

    def test_a_flag_read_without_waiting_is_no_number(self, executors, monkeypatch):
        """Then no token ever leaves."""
        decoder, cache, executor = self.ready(executors)
        before = report(decoder.model).decode_depths[LAYERS]
        monkeypatch.setattr(executor.device, "wait", lambda mark: None)
        decoder.step(cache, 5, threshold=-1.0)
        assert report(decoder.model).decode_depths[LAYERS] == before + 1

    def test_results_outlive_the_next_step(self, device):
        decoder = Decoder(device=device, **capturing(device))
        cache = decoder.start()
        for _ in range(3):
            decoder.step(cache, 4)
        first = decoder.step(cache, 5)
        copy = first.clone()
        decoder.step(cache, 9)
        assert torch.equal(first, copy)


class TestCaches:
    """A new KV cache means new captures, and nothing of the old one stays."""

    def test_a_replaced_cache_is_captured_anew_and_let_go(self, device):
        decoder = Decoder(device=device, **capturing(device))
        log = None
        kept = decoder.start(0)
        for _ in range(3):
            decoder.step(kept, 4, depth=1)
        log = decoder.graph.captures
        assert [c.unit for c in log.captures] == ["piece 0-1", "tail 1"]
        other = decoder.start(1)
        for _ in range(3):
            decoder.step(other, 4, depth=1)
        assert [c.unit for c in log.captures] == ["piece 0-1", "tail 1"] * 2
        gone = [weakref.ref(layer.keys) for layer in kept.layers]
        del kept
        gc.collect()
        assert [ref() for ref in gone] == [None] * LAYERS

    def test_captures_are_bounded_and_the_oldest_gives_way(self):
        decoder, plain = Decoder(**capturing("cpu", max_captures=3)), Decoder(**OPTIONS)
        steps = [(0, depth, None) for depth in (0, 0, 1, 1, 2, 2, 0, 0, 1, 1)]
        assert_same(steps, run(plain, steps), run(decoder, steps))
        log = decoder.graph.captures
        assert log.alive == 3
        assert log.dropped == log.made - 3 > 0
        assert "dropped (max_captures)" in str(report(decoder.model))

    @pytest.mark.gpu
    def test_device_memory_returns(self):
        """After the model and its caches are gone, the memory of graphs, pool and buffers is free again."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        decoder = Decoder(device="cuda", **capturing("cuda"))
        steps = [(0, depth, None) for depth in (0, 0, 1, 1, 2, 2)]
        run(decoder, steps)
        del decoder
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + 32 * 2**20  # cuBLAS keeps a workspace

    def test_teardown(self, executors):
        """With the model its executor, its buffers and its graphs go."""
        decoder = Decoder(**capturing("cpu"))
        run(decoder, [(0, 1, None)] * 3)
        executor = weakref.ref(executors.pop())
        buffers = [weakref.ref(b) for kept in executor()._buffers.values() for b in kept.values()]
        assert buffers
        del decoder
        torch._dynamo.reset()
        gc.collect()
        assert executor() is None
        assert not any(ref() is not None for ref in buffers)


def test_threads_never_mix_their_results(device):
    """Two threads decode on caches of their own at once: each gets the bits that it gets alone."""
    decoder = Decoder(device=device, **capturing(device, launch_ahead=True))
    steps = [None, None, 2.0, 2.0, -1.0, -1.0, 0.9, 2.0, -1.0, 0.9, 2.0, -1.0]

    def go(cache, seed, out):
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
        with stream:
            out += [decoder.step(cache, 3 + seed + i, threshold=tau) for i, tau in enumerate(steps)]
            if device == "cuda":
                torch.cuda.synchronize()

    alone: list[list] = [[], []]
    for seed in range(2):
        go(decoder.start(seed), seed, alone[seed])
    together: list[list] = [[], []]
    caches = [decoder.start(seed) for seed in range(2)]
    threads = [threading.Thread(target=go, args=(caches[s], s, together[s])) for s in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert len(b) == len(steps)
        assert all(map(torch.equal, a, b))


class TestTold:
    """Captures are logged and reported; what is not captured says why and where."""

    def test_every_capture_is_logged_and_listed(self, device, caplog):
        decoder = Decoder(device=device, batch=2, **capturing(device))
        with caplog.at_level(logging.INFO, logger="river_compile.capture"):
            run(decoder, [(0, 1, None)] * 3)
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("captured")]
        assert len(lines) == 2
        assert lines[0].startswith("captured piece 0-1: depth 1, batch 2, ")
        assert lines[1].startswith("captured tail 1: depth 1, batch 2, ")
        listed = report(decoder.model).to_dict()["graphs"][-1]["captures"]
        assert [(c["unit"], c["depth"], c["batch"]) for c in listed["captures"]] == [
            ("piece 0-1", 1, 2),
            ("tail 1", 1, 2),
        ]
        assert listed["buffer_bytes"] > 0
        assert "captured     2 graphs" in str(report(decoder.model))

    def test_a_growing_mask_leaves_the_prologue_uncaptured(self):
        """Hand-fed 2-D masks change their length with every token: the blocks are captured, the prologue is not."""
        plain, model = make("llama", layers=LAYERS), make("llama", layers=LAYERS)
        plain.compile(backend=river, options=OPTIONS)
        model.compile(backend=river, options=capturing("cpu"))
        depths = [2, 2, 2, 2, 2, 2, None, None]
        caches = [new_cache(m, "static") for m in (plain, model)]
        assert_same(
            ["prompt", *depths],
            (decode(plain, caches[0], depths), caches[:1]),
            (decode(model, caches[1], depths), caches[1:]),
        )
        log = report(model).graphs[-1].captures
        assert "tail 2" in [c.unit for c in log.captures]
        assert "attention_mask" in log.uncaptured["piece 0-2"]

    def test_dynamic_caches_and_prompts_are_not_captured(self):
        model = make("llama", layers=LAYERS)
        model.compile(backend=river, options=capturing("cpu"))
        decode(model, new_cache(model, "dynamic"), [None])
        prefill, step = [g.captures.reason for g in report(model).graphs]
        assert "a prompt's length differs" in prefill
        assert "the cache grows with every token" in step
        assert "cache_utils.py:" in step

    def test_on_a_cpu_nothing_is_captured_by_default(self):
        decoder = Decoder(**OPTIONS)
        run(decoder, [(0, 1, None)])
        assert decoder.graph.captures.reason == "the model lies on cpu; CUDA graphs need a GPU"

    def test_cuda_graphs_on_a_cpu_are_an_error(self):
        with pytest.raises(OptionError, match="cudagraphs=True needs a model on a GPU, and this one lies on cpu"):
            Decoder(**OPTIONS, cudagraphs=True).start()

    @pytest.mark.parametrize(
        ("name", "value"), [("cudagraphs", "yes"), ("max_captures", 0), ("launch_ahead", 1), ("cudagraphs", 1)]
    )
    def test_bad_values(self, name, value):
        with pytest.raises(OptionError, match=f"{name}={value!r} is not allowed"):
            RiverConfig.from_options({name: value})

    def test_a_unit_whose_capture_fails_runs_uncaptured_and_says_so(self, monkeypatch):
        """The others are captured, and the failed one is not tried again."""
        capture, tries = Recorder.capture, []

        def fail(self, unit, registers, outputs):
            if unit.name == "tail 1":
                tries.append(unit)
                raise CaptureFailed("operation not permitted when stream is capturing")
            return capture(self, unit, registers, outputs)

        monkeypatch.setattr(Recorder, "capture", fail)
        steps = [(0, 1, None)] * 4
        captured = Decoder(**capturing("cpu"))
        assert_same(steps, run(Decoder(**OPTIONS), steps), run(captured, steps))
        assert captured.graph.captures.uncaptured == {"tail 1": "operation not permitted when stream is capturing"}
        assert len(tries) == 1

    def test_a_full_cache_is_an_error_and_the_executor_goes_on(self, device):
        decoder = Decoder(device=device, **capturing(device))
        full, free = decoder.start(0, capacity=CAPACITY), decoder.start(1, capacity=CAPACITY)
        for _ in range(CAPACITY - 6):
            decoder.step(full, 4, depth=1)
        with pytest.raises(CacheFullError, match="holds 40 tokens; 40 are filled"):
            decoder.step(full, 4, depth=1)
        assert decoder.step(free, 4, depth=1).isfinite().all()


class TestWarmup:
    def test_it_captures_all_that_a_decode_needs(self, device):
        """After it, generation on the same cache captures nothing more, whatever the depth."""
        model = make("llama", layers=LAYERS).to(device)
        model.compile(backend=river, options=capturing(device))
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        log = river_compile.warmup(model, cache, depths=(0,))
        units = {c.unit for c in log.captures}
        assert units >= {"piece 0-1", "piece 1-2", "piece 2-3", "last 3-4", "tail 0", "tail 1", "tail 2", "tail 3"}
        assert int(cache.get_seq_length()) == 0
        captured = log.made
        ids = prompt(4).to(device)
        for tau in (-1.0, 0.9, 2.0):
            cache.reset()
            with forced_threshold(tau):
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, cache=cache)
        assert log.made == captured

    def test_what_it_cannot_do_is_an_error(self):
        model = make("llama", layers=2)
        with pytest.raises(ValueError, match="never reached the river backend"):
            river_compile.warmup(model, StaticCache(config=model.config, max_cache_len=CAPACITY))
        with pytest.raises(ValueError, match="a cache of 7 tokens or more, this one holds 6"):
            river_compile.warmup(model, StaticCache(config=model.config, max_cache_len=6))


class TestLaunchAhead:
    """When starting early pays."""

    def test_it_measures_first(self):
        ahead = LaunchAhead()
        assert not ahead.pays(1, 2)
        ahead.timed(1, 100e-6, 130e-6)
        assert not ahead.pays(1, 2)  # the next piece was never timed

    @pytest.mark.parametrize(("left", "expected"), [(False, True), (True, False)])
    def test_tokens_that_stay_make_it_pay(self, left, expected):
        """A piece of 100 us against a round trip of 30 us: worth it where fewer than 3 of 13 tokens leave."""
        ahead = LaunchAhead()
        for depth in (1, 2):
            ahead.timed(depth, 100e-6, 130e-6)
        for _ in range(60):
            ahead.saw(1, left)
        assert ahead.pays(1, 2) is expected

    def test_the_formula(self):
        """p = 3/13 is where both sides are equal."""
        ahead = LaunchAhead()
        for depth in (1, 2):
            ahead.timed(depth, 100e-6, 130e-6)
        ahead._left[1] = 3 / 13 - 0.01
        assert ahead.pays(1, 2)
        ahead._left[1] = 3 / 13 + 0.01
        assert not ahead.pays(1, 2)

    @pytest.mark.parametrize("always", [True, False])
    def test_an_option_decides_instead(self, always):
        assert LaunchAhead(always).pays(1, 2) is always
