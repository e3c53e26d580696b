"""The progress of a start: what is left, by estimates and by what parts took, and what a terminal and a log see."""

from __future__ import annotations

import logging

import pytest
import torch

import river_compile
from river_compile import progress as module
from river_compile.progress import StartProgress, estimate
from tests.support.families import make, prompt


class Clock:
    """A clock that stands."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def start(clock):
    start = StartProgress(clock)
    start.expect({"tracing": 10.0, "packing": 20.0, "compiling": 5.0})
    return start


def test_what_is_left_is_what_was_estimated(start, clock):
    assert start.left == 35
    with start.part("tracing"):
        clock.now += 4
        assert start.left == 31
        clock.now += 600  # longer than was thought: it must end at some time
        assert start.left == pytest.approx(25.3)


def test_a_slower_machine_is_slower_in_all_parts(start, clock):
    with start.part("tracing"):
        clock.now += 15
    assert start.left == 1.5 * 25
    with start.part("packing"):
        clock.now += 3
        assert start.left == 1.5 * 25 - 3


def test_a_part_that_counts_knows_better(start, clock):
    with start.part("packing"):
        clock.now += 4
        start.reached(0.5)
        assert start.left == 4 + 15


def test_parts_within_parts_count_once(start, clock):
    """Dynamo's tracing builds the graph, and packing reads the model's own text."""
    with start.part("tracing"):
        clock.now += 10
        with start.part("packing"):
            clock.now += 20
            assert start.left == pytest.approx(0.03 * 20 + 5)
        assert start.left == pytest.approx(0.3 + 5)
    assert start.left == 5


def test_without_a_terminal_the_log_says_how_long_it_takes(start, clock, caplog, monkeypatch):
    monkeypatch.setattr(module, "_APPEARS", 0.0)
    monkeypatch.setattr(module, "_LOGGED", 0.01)
    said = []
    with caplog.at_level(logging.INFO, "river_compile"), start.part("tracing"):
        clock.now += 4
        while not said:
            said = [record.message for record in caplog.records]
    assert said[0] == "river: tracing, 4 s so far, about 31 s left"


def test_a_start_ends_with_nothing_left(caplog):
    """What an accelerated model waits for is among the estimated parts, whose seconds grow with its size."""
    small, large = make("llama", layers=2), make("llama", layers=4)
    few, many = (estimate(model, "gptq") for model in (small, large))
    assert all(0 < few[part] <= many[part] for part in few)
    taken = []
    inner = StartProgress.part
    river_compile.accelerate(small, store=False)
    record = river_compile.model_record.find_record(small)
    record.progress.part = lambda name: taken.append(name) or inner(record.progress, name)
    ids = prompt()
    small.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
    assert set(few) <= set(taken)
    assert record.progress.left < 0.1 * sum(few.values())
