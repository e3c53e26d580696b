"""KV cache write and attention become one operator if nothing is between, with the counter if nothing else reads it.

Graphs built by hand run before and after, in plain torch.
"""

import operator

import pytest
import torch
from torch import Tensor, fx

from river_compile.kernels import cache_ops  # noqa: F401  (registers torch.ops.river)
from river_compile.passes.fusion.cache_rules import fuse_write

river = torch.ops.river
B, H, J, S, D = 2, 2, 1, 6, 16


class Built:
    """A graph of a write and an attention, with other nodes `between` and `around` them."""

    def __init__(self) -> None:
        self.graph, self.values = fx.Graph(), []
        self.qkv, self.k, self.v, self.counter = map(
            self.given, (torch.randn(B, 1, (H + 2 * J) * D), *torch.randn(2, B, J, S, D), torch.tensor(3))
        )
        self.mask = self.given(torch.ones(B, S, dtype=torch.bool).tril(4))

    def given(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"input_{len(self.values)}")
        node.meta["example_value"] = value
        self.values.append(value)
        return node

    def call(self, target, *args) -> fx.Node:
        node = self.graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: n.meta["example_value"])
        node.meta["example_value"] = target(*fx.map_arg(values, lambda v: v.clone() if isinstance(v, Tensor) else v))
        return node

    def slot(self) -> fx.Node:
        return self.call(operator.add, self.call(torch.arange, 1), self.counter)

    def write(self, slot: fx.Node) -> fx.Node:
        how = (None, None, None, None, slot, self.k, self.v, "none", 1e-6, False, False)
        return self.call(river.kv_fill.default, self.qkv, *how)

    def attend(self, q: fx.Node, v: fx.Node | None = None) -> fx.Node:
        seen = self.call(torch.squeeze, self.call(torch.reshape, q, (B, H, 1, D)), 2)
        return self.call(river.decode_attention.default, seen, self.k, v or self.v, self.mask, 0.25, 0.0)


def ran(graph: fx.Graph, values: list[Tensor]) -> list[Tensor]:
    """Returns a graph's outputs for copies of these values, and the copies afterwards."""
    values = [value.clone() for value in values]
    results = fx.GraphModule({}, graph)(*values)
    return [*results, *values]


def joined(built: Built, attention: fx.Node, *others: fx.Node) -> set[str]:
    """Fuses, checks that the graph computes the same, and returns the names of its operators."""
    built.graph.output((attention, *others))
    before = ran(built.graph, built.values)
    found = fuse_write(attention)
    built.graph.lint()
    assert built.graph.output_node().args[0][0] is found
    for one, other in zip(ran(built.graph, built.values), before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    return {getattr(n.target, "__name__", "") for n in built.graph.nodes if n.op == "call_function"}


def test_a_counter_is_counted_by_the_operator():
    built = Built()
    slot = built.slot()
    built.call(Tensor.add_, built.counter, 1)
    assert joined(built, built.attend(built.write(slot))) == {"attend.default"}
    (fused,) = built.graph.find_nodes(op="call_function", target=river.attend.default)
    assert fused.args[5:7] == (None, built.counter)


def steps_by_two(built: Built) -> fx.Node:
    slot = built.slot()
    built.call(Tensor.add_, built.counter, 2)
    return slot


def steps_twice(built: Built) -> fx.Node:
    slot = built.slot()
    for _ in range(2):
        built.call(Tensor.add_, built.counter, 1)
    return slot


def steps_before(built: Built) -> fx.Node:
    built.call(Tensor.add_, built.counter, 1)
    return built.slot()


def starts_at_one(built: Built) -> fx.Node:
    slot = built.call(operator.add, built.call(torch.arange, 1, 2), built.counter)
    built.call(Tensor.add_, built.counter, 1)
    return slot


def is_read_elsewhere(built: Built) -> fx.Node:
    slot = built.slot()
    built.call(Tensor.add_, built.counter, 1)
    built.call(operator.mul, built.counter, 2)
    return slot


def is_no_counter(built: Built) -> fx.Node:
    return built.call(torch.full, (1,), S - 1)


@pytest.mark.parametrize(
    "place", [steps_by_two, steps_twice, steps_before, starts_at_one, is_read_elsewhere, is_no_counter]
)
def test_any_other_slot_is_given(place):
    built = Built()
    slot = place(built)
    assert joined(built, built.attend(built.write(slot))) >= {"attend.default"}
    (fused,) = built.graph.find_nodes(op="call_function", target=river.attend.default)
    assert fused.args[5:7] == (slot, None)


def test_what_comes_between_keeps_them_apart():
    both = {"kv_fill.default", "decode_attention.default"}
    built = Built()  # the cache is read
    q = built.write(built.slot())
    total = built.call(torch.sum, built.k)
    assert joined(built, built.attend(q), total) >= both
    built = Built()  # what the write read changes
    q = built.write(built.slot())
    built.call(Tensor.add_, built.qkv, 1.0)
    assert joined(built, built.attend(q)) >= both
    built = Built()  # the query is used elsewhere too
    q = built.write(built.slot())
    assert joined(built, built.attend(q), built.call(torch.sum, q)) >= both
    built = Built()  # another cache is read
    q = built.write(built.slot())
    assert joined(built, built.attend(q, v=built.k)) >= both
    built = Built()  # the query is no write's
    assert joined(built, built.attend(built.given(torch.randn(B, H, D)))) >= {"decode_attention.default"}
