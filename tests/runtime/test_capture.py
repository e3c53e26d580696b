"""Captured decode steps are the uncaptured ones, to the bit, whatever the order of replays.

The recorder stands in for CUDA graphs: it runs launches late, spoils every value that a real replay would not have
written, and refuses to replay on inputs that have moved (`tests/support/recorder.py`). On a machine with a
GPU most tests run with CUDA graphs as well (marked `gpu`), and one looks at the device's memory.

Tracing takes most of the time, so one decoder serves many tests. The bound on captures is set on its runner, and what
is expected of it comes from the same compiled steps in a plain runner.
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

import river_compile
from river_compile import report
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.errors import CacheFullError, OptionError
from river_compile.runtime import captures
from river_compile.runtime.captures import CaptureFailed, CudaGraphs
from tests.support.captured import (
    CAPACITY,
    DEVICES,
    LAYERS,
    LEAVE,
    OPTIONS,
    STAY,
    STEP,
    Decoder,
    assert_same,
    capturing,
    check,
    run,
    uncaptured,
)
from tests.support.decoding import decode, new_cache
from tests.support.families import make, prompt
from tests.support.lowerings import INDUCTOR
from tests.support.recorder import Recorder, StaleReplay


@pytest.fixture(scope="module")
def recorded() -> Decoder:
    """A decoder on the recorder, for tests that look into it."""
    return Decoder(compiled_prompts=True)


@pytest.fixture(scope="module", params=DEVICES)
def shared(request, recorded) -> Decoder:
    return recorded if request.param == "cpu" else Decoder(device=request.param, compiled_prompts=True)


@pytest.fixture
def decoder(shared) -> Decoder:
    run(shared, [STAY])
    return shared


@pytest.fixture
def recorder(recorded) -> Decoder:
    run(recorded, [STAY])
    return recorded


class TestSameBits:
    """What a captured decoder computes is what the uncaptured one computes."""

    def test_any_mix_of_depths_and_caches(self, decoder):
        """Two caches in turn, forced depths, thresholds in between: logits, entries and counters."""
        before = decoder.log.made

        @settings(max_examples=15)
        @given(st.lists(STEP, min_size=6, max_size=14))
        def try_out(steps):
            check(decoder, steps)

        try_out()
        assert decoder.log.made > before

    @pytest.mark.parametrize("name", ["gemma2", "mixtral"])
    @pytest.mark.slow
    def test_families(self, name):
        """Sliding windows before and after they are full, counters kept in Python, experts."""
        decoder = Decoder(name)
        check(decoder, [(0, None, tau) for tau in (2.0, 2.0, -1.0, -1.0, 0.9, 2.0, 2.0, 0.9, 0.95, -1.0)])
        assert any(g.captures.made for g in report(decoder.model).graphs)

    def test_what_is_remembered_between_tokens(self):
        decoder = Decoder(criterion="confidence", first_exit=2)
        steps = [(i % 2, None, tau) for tau in (0.0, 4.45, 5.0) * 2 for i in range(4)]
        with river_compile.trace() as actual:
            a = run(decoder, steps)
        with uncaptured(decoder.model), river_compile.trace() as expected:
            b = run(decoder, steps)
        assert_same(steps, b, a)
        assert [(s.depth, s.entropy) for s in actual.steps] == [(s.depth, s.entropy) for s in expected.steps]
        assert {s.depth for s in actual.tokens} == {1, LAYERS}
        assert "tail 1" in {c.unit for c in decoder.log.captures}

    @pytest.mark.core
    def test_inductor(self):
        """Compiled segments, called without AOTAutograd's wrappers and with strides that they check."""
        check(Decoder(kernels=INDUCTOR, layers=2), [STAY, STAY, LEAVE, LEAVE, STAY, LEAVE])

    @pytest.mark.core
    def test_exact_mode(self):
        """Drafts at depth 0 and the passes that verify them are captured."""
        model, ids = Decoder(layers=2).model, prompt()
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        plain = make("llama", layers=2).generate(ids, **settings)
        drafts = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
        for _ in range(2):
            text = model.generate(ids, **settings, custom_generate=exact, **drafts)
            assert torch.equal(text, plain)
        units = {record.unit for graph in report(model).graphs for record in graph.captures.captures}
        assert units >= {"last 0-2", "tail 0"}


class TestOrder:
    """What is launched when, as the recorder saw it."""

    def ready(self, recorder):
        cache = recorder.start()
        for tau in (2.0, 2.0, 2.0, -1.0, -1.0, -1.0):
            recorder.step(cache, 4, threshold=tau)
        return cache

    def events(self, recorder, cache, tau):
        Recorder.events.clear()
        recorder.step(cache, 5, threshold=tau)
        return [f"{e.what} {e.name}".strip() for e in Recorder.events if e.what != "run"]

    def test_every_flag_is_awaited_before_the_next_launch(self, recorder):
        cache = self.ready(recorder)
        spans = ["span 0-1", "span 1-2", "span 2-3"]
        never = [f"{what} {span}" for span in spans for what in ("launch", "wait")]
        assert self.events(recorder, cache, 2.0) == [*never, "launch last 3-4", "end"]
        assert self.events(recorder, cache, -1.0) == [*never[:2], "launch tail 1", "end"]

    def test_a_state_is_found_by_its_cache_and_replays(self, recorder):
        """A step copies its inputs into the state's, replays, and returns copies: nothing else runs."""
        cache = self.ready(recorder)
        Recorder.events.clear()
        recorder.step(cache, 5, depth=1)
        recorder.step(cache, 5, depth=1)
        Recorder.events.clear()
        recorder.step(cache, 5, depth=1)
        assert [f"{e.what} {e.name}".strip() for e in Recorder.events] == ["launch span 0-1", "launch tail 1", "end"]


class TestStaleness:
    """The recorder can fail: it notices what a GPU would get wrong in silence."""

    @pytest.fixture
    def cache(self, recorder):
        cache = recorder.start()
        for tau in (2.0, 2.0, 2.0, -1.0, -1.0, -1.0):
            recorder.step(cache, 4, threshold=tau)
        return cache

    def test_a_replay_on_moved_inputs_is_refused(self, recorder, cache):
        state = recorder.state
        moved = next(i for i, slot in enumerate(state.slots) if isinstance(slot, torch.Tensor) and slot.dim() == 4)
        state.slots[moved] = state.slots[moved].clone()
        with pytest.raises(StaleReplay, match="has moved since the capture"):
            state.step(1)

    def test_a_buffer_that_nobody_wrote_in_this_step_is_no_number(self, recorder, cache, monkeypatch):
        """A tail whose span was left out reads an earlier token's hidden state: NaN here."""
        assert recorder.step(cache, 5, threshold=-1.0).isfinite().all()
        launch = Recorder.launch

        def leave_out(device, recording):
            if recording.unit.name == "span 0-1":
                recording.flags[1] = 1.0
            else:
                launch(device, recording)

        monkeypatch.setattr(Recorder, "launch", leave_out)
        assert recorder.step(cache, 5, threshold=-1.0).isnan().all()

    def test_a_flag_read_without_waiting_is_no_number(self, recorder, cache, monkeypatch):
        """Then no token ever leaves."""
        monkeypatch.setattr(Recorder, "wait", lambda device: None)
        with river_compile.trace() as seen:
            recorder.step(cache, 5, threshold=-1.0)
        assert [step.depth for step in seen.tokens] == [LAYERS]

    def test_results_outlive_the_next_step(self, decoder):
        cache = decoder.start()
        for _ in range(3):
            decoder.step(cache, 4, depth=1)
        first = decoder.step(cache, 5, depth=1)
        copy = first.clone()
        decoder.step(cache, 9, depth=1)
        assert torch.equal(first, copy)


class TestCaches:
    """A new KV cache means new captures, and nothing of the old one stays."""

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.slow
    def test_a_replaced_cache_is_captured_anew_and_let_go(self, device):
        """The decoder is the test's own: a cache at the addresses of an earlier, freed one would be replayed on."""
        decoder = Decoder(device=device)
        run(decoder, [STAY])
        caches = [decoder.start(seed) for seed in range(2)]
        for cache in caches:
            before = decoder.log.made
            for _ in range(3):
                decoder.step(cache, 4, depth=1)
            assert [c.unit for c in decoder.log.captures][before - decoder.log.made :] == ["span 0-1", "tail 1"]
        seen = [weakref.ref(cache.layers[0].keys) for cache in caches]
        del caches, cache
        for seed in range(2, 16):
            cache = decoder.start(seed)
            decoder.step(cache, 4, depth=1)
            seen.append(weakref.ref(cache.layers[0].keys))
        del cache
        gc.collect()
        # (Each graph has states of its latest four caches: nothing tells whether one is used again.)
        assert sum(keys() is not None for keys in seen) <= 4 * len(report(decoder.model).graphs) < len(seen)

    @pytest.mark.gpu
    def test_device_memory_returns(self):
        """A model after whose end libraries keep their workspaces, then another one, of which nothing is left."""

        def live_and_die() -> int:
            decoder = Decoder(device="cuda")
            run(decoder, [(0, depth, None) for depth in (0, 0, 1, 1, 2, 2)])
            assert decoder.log.made
            del decoder
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()

        first = live_and_die()
        assert live_and_die() <= first


def test_threads_never_mix_their_results(decoder):
    """Two threads decode on separate caches at the same time: each gets the bits that it gets alone."""
    steps = [2.0, 2.0, -1.0, -1.0, 0.9, 2.0, -1.0, 0.9, 2.0, -1.0]

    def go(cache, seed, out):
        on_gpu = decoder.device == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
            out += [decoder.step(cache, 3 + seed + i, threshold=tau) for i, tau in enumerate(steps)]
            if on_gpu:
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


class TestReported:
    """Captures are logged and reported; what is not captured says why and where."""

    @pytest.mark.parametrize("device", DEVICES)
    def test_every_capture_is_logged_and_listed(self, device, caplog):
        """The decoder is the test's own: on a cache at a freed one's addresses no capture would be made."""
        decoder = Decoder(device=device, layers=2)
        run(decoder, [STAY])
        with caplog.at_level(logging.INFO, logger="river_compile.runtime.launcher"):
            run(decoder, [(0, 1, None)] * 3)
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("captured")]
        assert len(lines) == 2
        assert lines[0].startswith("captured span 0-1: depth 1, batch 1, ")
        assert lines[1].startswith("captured tail 1: depth 1, batch 1, ")
        listed = report(decoder.model).to_dict()["graphs"][-1]["captures"]
        assert [(c["unit"], c["depth"], c["batch"]) for c in listed["captures"][-2:]] == [
            ("span 0-1", 1, 1),
            ("tail 1", 1, 1),
        ]
        assert listed["buffer_bytes"] > 0
        assert f"captured     {decoder.log.made} graphs" in str(report(decoder.model))

    def test_cuda_graphs_on_a_cpu_are_an_error(self, monkeypatch):
        wanted = pytest.raises(OptionError, match="graphs=True requires a model on a GPU or kernels=")
        monkeypatch.delitem(captures.DEVICES, "cpu", raising=False)
        with wanted:
            Decoder(compiled_prompts=True).start()

    def test_a_unit_whose_capture_fails_runs_uncaptured_and_says_so(self, monkeypatch):
        """The others are captured, and the failed one is not tried again."""
        decoder = Decoder(layers=2)
        decoder.step(decoder.start(), 3, depth=1)
        kind, tries = decoder.executor.captures.kind, []
        capture = kind.capture

        def fail(device, unit, *arguments):
            if unit.name == "tail 1":
                tries.append(unit)
                raise CaptureFailed("operation not permitted when stream is capturing")
            return capture(device, unit, *arguments)

        monkeypatch.setattr(kind, "capture", fail)
        check(decoder, [(0, 1, None)] * 4)
        assert decoder.log.uncaptured_units["tail 1"] == "operation not permitted when stream is capturing"
        assert {c.unit for c in decoder.log.captures} == {"span 0-1"}
        assert len(tries) == 1

    def test_a_full_cache_is_an_error_and_the_executor_goes_on(self, decoder):
        full, free = decoder.start(0), decoder.start(1)
        for _ in range(CAPACITY - 6):
            decoder.step(full, 4, depth=1)
        with pytest.raises(CacheFullError, match="holds 40 tokens, 40 are filled"):
            decoder.step(full, 4, depth=1)
        assert decoder.step(free, 4, depth=1).isfinite().all()


@pytest.mark.usefixtures("fresh_dynamo")
class TestSizes:
    """Sizes that differ between calls."""

    @pytest.mark.slow
    def test_caches_of_several_lengths_and_batches(self):
        """A second one makes Dynamo trace with dynamic sizes: captures are distinguished by their values."""
        decoder = Decoder()

        def run_all():
            sizes = [(40, 1), (24, 2), (32, 3)]
            caches = [decoder.start(seed, *size) for seed, size in enumerate(sizes)]
            return [decoder.step(caches[i % 3], 3 + i, threshold=(2.0, -1.0)[i // 3 % 2]) for i in range(12)], caches

        actual = run_all()
        with uncaptured(decoder.model):
            expected = run_all()
        assert_same([*range(12)], expected, actual)
        assert {c.batch for g in report(decoder.model).graphs for c in g.captures.captures} == {1, 2, 3}

    def test_a_growing_mask_keeps_passes_uncaptured(self):
        """Hand-fed 2-D masks change their length with every token: nothing comes twice, and the log names the mask."""
        model = make("llama", layers=3)
        model.compile(backend=river, options=capturing())
        depths = [2, None] * 6
        caches = [new_cache(model, "static") for _ in range(2)]
        actual = decode(model, caches[0], depths, plain_prompt=True)
        with uncaptured(model):
            expected = decode(model, caches[1], depths, plain_prompt=True)
        assert_same(["prompt", *depths], (expected, caches[1:]), (actual, caches[:1]))
        log = report(model).graphs[-1].captures
        assert not log.captures
        assert "attention_mask" in log.uncaptured_units["pass"]

    def test_dynamic_caches_are_not_captured(self):
        model = make("llama", layers=2)
        model.compile(backend=river, options=capturing())
        decode(model, new_cache(model, "dynamic"), [None])
        for graph in report(model).graphs:
            assert "the cache grows with every token" in graph.captures.not_captured
            assert "cache_utils.py:" in graph.captures.not_captured

    def test_passes_of_up_to_16_tokens_are_captured(self):
        """Those of a GPU: verifications are as narrow, and come again."""
        for kind in (Recorder, CudaGraphs):
            assert kind.takes(torch.float32, 2, 8)
            assert not kind.takes(torch.float32, 2, 9)

    def test_on_a_cpu_nothing_is_captured_by_default(self):
        model = make("llama", layers=2)
        model.compile(backend=river, options=OPTIONS)
        decode(model, new_cache(model, "static"), [None])
        assert {g.captures.not_captured for g in report(model).graphs} == {
            "the model lies on cpu; CUDA graphs need a GPU, tapes kernels='native'"
        }


def test_executor_buffers_and_graphs_go_with_their_model(fresh_dynamo):
    decoder = Decoder(layers=2)
    run(decoder, [(0, 1, None)] * 3)
    executor = weakref.ref(decoder.executor)
    cache = decoder.start()
    for _ in range(3):
        decoder.step(cache, 4, depth=1)
    buffers = [weakref.ref(buffer) for buffer in decoder.state.buffers.values()]
    assert buffers
    del decoder, cache
    torch._dynamo.reset()
    gc.collect()
    assert executor() is None
    assert not any(ref() is not None for ref in buffers)
