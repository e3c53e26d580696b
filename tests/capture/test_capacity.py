"""Capacity in a static cache, told without waiting for the device: what the host counts, and when it reads again."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

from river_compile import CacheFullError, river
from river_compile.backend import executors_of
from river_compile.runtime import capacity
from river_compile.runtime.capacity import Capacity
from tests.support.captured import LEAVE, STAY, Decoder, assert_same, captured, run
from tests.support.decoding import cache_argument
from tests.support.families import make, prompt


class Reads(TorchFunctionMode):
    """Counts what reads a value back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "cpu", "nonzero"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """A list that receives every length that is read."""
    found, read = [], capacity._read

    def note(length):
        found.append(read(length))
        return found[-1]

    monkeypatch.setattr(capacity, "_read", note)
    return found


def decode_room(capacity=8, counts=True):
    return Capacity(length=0, new=1, capacity=capacity, counts=counts)


def step(check: Capacity, length: torch.Tensor, advance) -> None:
    slots = [length, None]
    filled = check.check(slots)
    advance(length)
    check.took(slots, filled)


def unseen(length):
    """What a replayed graph does: PyTorch counts no change."""
    length.detach().numpy()[...] += 1


def seen(length):
    length.add_(1)


@pytest.mark.parametrize("advance", [unseen, seen])
def test_the_length_is_read_once_and_again_where_the_cache_is_full(reads, advance):
    length, check = torch.tensor(3), decode_room()
    for _ in range(5):
        step(check, length, advance)
    assert reads == [3]
    with pytest.raises(CacheFullError, match="holds 8 tokens; 8 are filled and this step adds 1"):
        step(check, length, advance)
    assert reads == [3, 8]


def test_a_length_that_others_change_is_read_again(reads):
    """Emptied, cut, or filled by another pass of the model, compiled or not."""
    length, check = torch.tensor(3), decode_room()
    compiled = torch.compile(lambda t: t.add_(2), backend="aot_eager")
    with torch.no_grad():
        for change in (lambda: length.zero_(), lambda: length.sub_(1), lambda: compiled(length)):
            step(check, length, unseen)
            change()
            step(check, length, unseen)
    assert reads == [3, 0, 1, 5]
    assert length == 6


def test_other_graphs_and_caches_are_told_apart(reads):
    lengths, checks = [torch.tensor(3), torch.tensor(6)], [decode_room(), decode_room()]
    for _ in range(2):
        for length in lengths:
            for check in checks[: 1 + (length is lengths[0])]:
                step(check, length, unseen)
    assert reads == [3, 6]
    with pytest.raises(CacheFullError, match="8 are filled"):
        step(checks[1], lengths[1], unseen)


def test_a_step_that_failed_leaves_nothing_known(reads):
    length, check = torch.tensor(3), decode_room()
    step(check, length, unseen)
    check.check([length, None])  # and nothing is launched
    step(check, length, unseen)
    assert reads == [3, 4]


def test_lengths_of_inference_mode_are_read_every_time(reads):
    with torch.inference_mode():
        length = torch.tensor(3)
    for _ in range(2):
        step(decode_room(), length, lambda t: None)
    assert reads == [3, 3]


def test_on_a_cpu_every_step_reads(reads):
    length = torch.tensor(3)
    for _ in range(2):
        step(decode_room(counts=False), length, lambda t: None)
    assert reads == [3, 3]


@contextlib.contextmanager
def before_the_first_launch(executor):
    """Yields the names of what reads a value back between a step's beginning and its first launch."""
    mode, runner = Reads(), executor.runner
    for_pass, launch = runner.for_pass, runner.device.launch
    entered = contextlib.ExitStack()

    def begin(args):
        entered.enter_context(mode)
        return for_pass(args)

    def end(graph, slots):
        entered.close()
        return launch(graph, slots)

    runner.for_pass, runner.device.launch = begin, end
    yield mode.names
    del runner.for_pass, runner.device.launch


@pytest.fixture(scope="module")
def shared():
    return Decoder(layers=2)


@pytest.fixture
def decoder(shared):
    """A decoder whose executors read every length unless the test says otherwise."""
    yield shared
    for executor in executors_of(shared.model):
        executor.room.counts = False


@pytest.mark.parametrize("depth", [None, 1])
def test_a_step_waits_for_nothing_before_its_first_launch(decoder, depth):
    run(decoder, [STAY, LEAVE])
    executor = captured(decoder.model)[-1]
    cache = decoder.start()
    for counts in (False, True):
        executor.room.counts = counts
        for _ in range(2):
            decoder.step(cache, 4, depth, threshold=2.0)
        with before_the_first_launch(executor) as names:
            decoder.step(cache, 4, depth, threshold=2.0)
        assert len(names) == (not counts), names


def test_steps_that_count_are_those_that_read(decoder):
    steps = [(i % 2, None, tau) for i, tau in enumerate((2.0, 2.0, -1.0, 0.9, 2.0, -1.0, 0.9, -1.0))]
    expected = run(decoder, steps)
    for executor in executors_of(decoder.model):
        executor.room.counts = True
    assert_same(steps, expected, run(decoder, steps))


@pytest.mark.slow
def test_a_full_cache_is_noticed_by_counting():
    model = make("llama", layers=2)
    model.compile(backend=river, options={"lowering": "eager", "quantizer": "rtn", "cudagraphs": True})
    cache = StaticCache(config=model.config, max_cache_len=10)
    held = {cache_argument(model): cache, "use_cache": True}
    with torch.no_grad():
        model(prompt(6), **held)
        model(prompt(1), **held)
        for executor in executors_of(model):
            if executor.room is not None:
                executor.room.counts = True
        for _ in range(3):
            model(prompt(1), **held)
        with pytest.raises(CacheFullError, match="holds 10 tokens; 10 are filled"):
            model(prompt(1), **held)
    assert int(cache.get_seq_length()) == 10


def test_caches_of_several_sizes_have_each_its_own_capacity(fresh_dynamo):
    """From the second size on Dynamo traces the number of slots as dynamic."""
    model = make("llama", layers=2)
    model.compile(backend=river, options={"lowering": "eager", "quantizer": "rtn", "exit_depth": 1})
    for slots in (8, 9, 10):
        cache = StaticCache(config=model.config, max_cache_len=slots)
        held = {cache_argument(model): cache, "use_cache": True}
        with torch.no_grad():
            model(prompt(7), **held)
            for _ in range(slots - 7):
                model(prompt(1), **held)
            before = [layer.keys.clone() for layer in cache.layers]
            with pytest.raises(CacheFullError, match=f"holds {slots} tokens; {slots} are filled"):
                model(prompt(1), **held)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
