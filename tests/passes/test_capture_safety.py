"""What may be captured and what may run twice, decided on hand-made graphs of one block.

Every case changes one thing of a block that may run twice, so that each condition is seen to matter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from river_compile.passes.capture_safety import fixed_inputs, obstacle, runs_once
from river_compile.passes.nodes import source_of
from river_compile.passes.program import Block, DecoderPlan, KVSlot, Refusal, Segment

KV = torch.zeros(1, 2, 8, 4)


class BlockGraph:
    """Builds the graph of one block: ``hidden + (something of) keys``, after writing a slot and counting it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.hidden = self._input("hidden", torch.zeros(1, 1, 4))
        self.keys = self._input("keys", KV)
        self.values = self._input("values", KV)
        self.counter = self._input("cumulative_length", torch.tensor(0))
        self.steps: list[fx.Node] = []

    def _input(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def method(self, name: str, value: object, *args: object) -> fx.Node:
        node = self.graph.call_function(getattr(torch.Tensor, name), args)
        node.meta["example_value"] = value
        node.meta["stack_trace"] = '  File "/site/cache_utils.py", line 483, in update\n    self.keys.something()'
        self.steps.append(node)
        return node

    def slot(self, base: fx.Node | None = None) -> fx.Node:
        return self.method("add", torch.tensor([0]), base or self.counter, 0)

    def write(self, cache: fx.Node, position: fx.Node) -> fx.Node:
        return self.method("index_copy_", KV, cache, 2, position, self.hidden)

    def count(self, step: object = 1) -> fx.Node:
        return self.method("add_", torch.tensor(0), self.counter, step)

    def read(self, cache: fx.Node) -> fx.Node:
        return self.method("sum", torch.zeros(1), cache)

    @property
    def plan(self) -> DecoderPlan:
        self.graph.output(tuple(self.steps[-1:]))
        block = Block(0, "layers.0", self.hidden, self.steps[-1], KVSlot("static", (), (self.counter,), 8))
        module = fx.GraphModule({}, self.graph)
        return DecoderPlan(module.graph, (block,), dict.fromkeys(self.steps, 1), 1, 1)


def plain(b: BlockGraph) -> None:
    position = b.slot()
    b.count()
    b.write(b.keys, position)
    b.write(b.values, position)
    b.read(b.keys)


def test_a_block_that_writes_a_slot_and_counts_may_run_twice():
    block = BlockGraph()
    plain(block)
    plan = block.plan
    assert runs_once(plan, plan.blocks[0]) is None
    assert fixed_inputs(plan) == {block.keys, block.values, block.counter}


def counts_twice(b: BlockGraph) -> None:
    plain(b)
    b.count()


def counts_by_a_value(b: BlockGraph) -> None:
    b.count(b.method("size", torch.tensor(1), b.hidden))


def counts_by_two(b: BlockGraph) -> None:
    b.count(2)


def shifts_the_cache(b: BlockGraph) -> None:
    b.method("copy_", KV, b.keys, b.method("roll", KV, b.keys, -1, -2))


def writes_through_a_view(b: BlockGraph) -> None:
    b.write(b.method("narrow", KV, b.keys, 1, 0, 1), b.slot())


def reads_first(b: BlockGraph) -> None:
    position = b.slot()
    b.read(b.keys)
    b.write(b.keys, position)


def slot_from_the_hidden_state(b: BlockGraph) -> None:
    b.write(b.keys, b.method("argmax", torch.tensor([0]), b.slot(hidden_of_the_block_before(b))))


def hidden_of_the_block_before(b: BlockGraph) -> fx.Node:
    """Returns a value that another part of the graph computed."""
    node = b.method("relu", torch.zeros(1, 1, 4), b.hidden)
    b.steps.remove(node)
    return node


def slot_from_the_cache(b: BlockGraph) -> None:
    b.write(b.values, b.method("argmax", torch.tensor([0]), b.slot(b.keys)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (counts_twice, "it changes a value otherwise than by writing to a slot or counting"),
        (counts_by_two, "it changes a value otherwise than by writing to a slot or counting"),
        (counts_by_a_value, "it changes a value otherwise than by writing to a slot or counting"),
        (shifts_the_cache, "it changes a value otherwise than by writing to a slot or counting"),
        (writes_through_a_view, "it changes a value otherwise than by writing to a slot or counting"),
        (reads_first, "it reads the KV cache before it writes to it"),
        (slot_from_the_hidden_state, "the slot that it writes to depends on more than counters and inputs"),
        (slot_from_the_cache, "the slot that it writes to depends on more than counters and inputs"),
    ],
)
def test_other_blocks_may_not_and_the_reason_names_the_line(build: Callable, reason: str):
    block = BlockGraph()
    build(block)
    plan = block.plan
    refusal = runs_once(plan, plan.blocks[0])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason
    assert refusal.where


def test_a_source_line_is_the_innermost_one():
    block = BlockGraph()
    assert source_of(block.count()) == "add_, cache_utils.py:483"
    assert source_of(block.keys) == "keys"


def test_a_write_through_a_view_keeps_its_input_in_place():
    """A cache that is written through a view must not be replaced by a copy either."""
    block = BlockGraph()
    writes_through_a_view(block)
    assert block.keys in fixed_inputs(block.plan)


class TestObstacles:
    def segment(self, block: BlockGraph) -> Segment:
        return Segment("block", 1, block.plan.graph, (), ())

    def test_none(self):
        block = BlockGraph()
        plain(block)
        assert obstacle(self.segment(block), torch.device("cpu")) is None

    def test_a_value_read_on_the_host(self):
        block = BlockGraph()
        block.method("item", 0, block.counter)
        assert str(obstacle(self.segment(block), torch.device("cpu"))) == (
            "a value is read on the host (at item, cache_utils.py:483)"
        )

    def test_a_value_on_another_device(self):
        block = BlockGraph()
        block.method("to", torch.zeros(1, device="meta"), block.hidden, "meta")
        refusal = obstacle(self.segment(block), torch.device("cpu"))
        assert refusal == Refusal("a value lies on meta, the hidden state on cpu", "to, cache_utils.py:483")
