"""Gaps of a trace, and the cost of decisions on the device, by doubles of events, graphs and predicates."""

import contextlib
import json
import types

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import conditional, cuda_trace


def event(name, start, end, on_device=True):
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    return types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=start, end=end))


def test_gaps_stand_between_what_ends_last_and_what_begins_next(capsys):
    events = [
        event("long", 0, 50),
        event("short", 10, 20),
        event("host", 50, 60, on_device=False),
        event("late", 57, 60),
        event("last", 80, 90),
    ]
    assert cuda_trace.gaps(events) == [(20, "late", "last"), (7, "long", "late")]
    found = cuda_trace.show("forced never", events)
    assert (found["busy_us"], found["idle_us"]) == (63, 27)
    assert "the device works 63 us and waits 27 us in 2 gaps" in capsys.readouterr().out
    assert cuda_trace.gaps([]) == []


class FakeGraph:
    """Records what is captured, and replays it: a body runs where its predicate says so."""

    limit = 99  # of levels

    def __init__(self):
        self.bodies = [[]]
        self.open = []

    def begin_capture_to_if_node(self, predicate):
        if len(self.open) == self.limit:
            raise RuntimeError("too deep\nmore")
        body: list = []
        self.bodies[-1].append((predicate, body))
        self.bodies.append(body)
        self.open.append(predicate)

    def end_capture_to_conditional_node(self):
        self.bodies.pop()
        self.open.pop()

    def replay(self):
        self._run(self.bodies[0])

    def _run(self, body):
        for predicate, inner in body:
            if predicate is None:
                inner()
            elif predicate.item():
                self._run(inner)


class Work(torch.Tensor):
    """Adds when a replay comes to it, where a graph is captured."""

    graph = None

    def add_(self, number):
        if Work.graph is None:
            return super().add_(number)
        Work.graph.bodies[-1].append((None, lambda: super(Work, self).add_(number)))
        return self


@pytest.fixture
def card(monkeypatch):
    cuda = torch.cuda

    @contextlib.contextmanager
    def captured(graph):
        Work.graph = graph
        try:
            yield
        finally:
            Work.graph = None

    ones, zeros = torch.ones, torch.zeros
    monkeypatch.setattr(torch, "ones", lambda size, dtype, device: ones(size, dtype=dtype))
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size).as_subclass(Work))
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(cuda, "graph", captured)
    monkeypatch.setattr(conditional, "_REPEATS", 3)
    monkeypatch.setattr(conditional, "microseconds", lambda graph: [graph.replay() for _ in range(3)] and 5.0)
    monkeypatch.setattr(conditional.gpu_facts, "facts", lambda: {"driver": "1"})


def test_bodies_run_where_all_predicates_say_so(card, tmp_path):
    """And a depth that the driver refuses is noted, and the next one measured."""
    file = tmp_path / "conditional.json"
    FakeGraph.limit = 4
    assert conditional.main(["--levels", "1", "4", "8", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[0] == {"levels": 1, "line_us": 5.0, "taken_us": 5.0, "not_taken_us": 5.0}
    assert rows[2] == {"levels": 8, "error": "too deep"}
    assert [row["levels"] for row in rows] == [1, 4, 8, 2]


def test_bodies_that_run_against_their_predicate_are_an_error(card, monkeypatch):
    monkeypatch.setattr(
        FakeGraph, "_run", lambda self, body: [inner() if p is None else self._run(inner) for p, inner in body]
    )
    with pytest.raises(RuntimeError, match="2 of 2 bodies ran where all were to, 6 where none was"):
        conditional.measure(2)


def test_a_torch_without_such_nodes_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {}))
    assert conditional.main([]) == 0
    assert "captures no conditional nodes; 2.12 and later do" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("program", [conditional, cuda_trace])
def test_without_a_gpu_it_says_so(program, capsys):
    assert program.main([]) == 1
    assert "there is none here" in capsys.readouterr().err
