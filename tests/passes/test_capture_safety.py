"""Which inputs are fixed and which segments can be captured, on hand-made graphs of one block."""

from __future__ import annotations

import torch
from torch import fx

from river_compile.passes.capture_safety import fixed_inputs, obstacle
from river_compile.passes.nodes import source_of
from river_compile.passes.program import Block, DecoderPlan, KVSlot, Refusal, Segment

KV = torch.zeros(1, 2, 8, 4)


class BlockGraph:
    """Builds a block that writes and counts a slot, then returns ``hidden + f(keys)``."""

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


def test_what_a_block_writes_in_place_stays_where_it_is():
    block = BlockGraph()
    plain(block)
    assert fixed_inputs(block.plan) == {block.keys, block.values, block.counter}


def writes_through_a_view(b: BlockGraph) -> None:
    b.write(b.method("narrow", KV, b.keys, 1, 0, 1), b.slot())


def test_a_source_line_is_the_innermost_one():
    block = BlockGraph()
    assert source_of(block.count()) == "add_, cache_utils.py:483"
    assert source_of(block.keys) == "keys"


def test_a_write_through_a_view_keeps_its_input_in_place():
    """A copy must not replace a cache that is written through a view."""
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
