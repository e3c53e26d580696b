"""The decoder found in a graph: parts, hidden states, KV caches, and why there is none."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from river_compile.passes.decoder import find_decoder
from river_compile.passes.nodes import shape
from river_compile.passes.normalize import normalized
from river_compile.passes.program import DecoderPlan, Refusal
from tests.passes.decoders import DIM, KV_HEADS, SLOTS, WIDTH, Spelling, decoder, spellings
from tests.passes.graphs import GraphBuilder
from tests.support.examples import examples

PLAIN = Spelling(blocks=3)


def plan_of(how: Spelling, seed: int = 0) -> DecoderPlan | Refusal:
    return find_decoder(normalized(decoder(how, seed)[0]))


@examples(30)
@given(how=spellings(), seed=st.integers(0, 2**16))
def test_every_node_has_a_part_and_parts_run_in_order(how, seed):
    plan = plan_of(how, seed)
    assert isinstance(plan, DecoderPlan)
    assert [block.path for block in plan.blocks] == [f"model.layers.{i}" for i in range(how.blocks)]
    assert set(plan.part_of.values()) == set(range(how.blocks + 2))
    for node, part in plan.part_of.items():
        assert all(plan.part_of.get(n, 0) <= part for n in node.all_input_nodes)
    assert (plan.batch, plan.query_length, plan.kind) == (how.batch, 1, "decode")
    for before, after in zip(plan.blocks, plan.blocks[1:], strict=False):
        assert before.hidden_out is after.hidden_in
    assert all(shape(block.hidden_out) == (how.batch, 1, WIDTH) for block in plan.blocks)


def test_a_static_cache_has_slots_and_counters():
    kv = plan_of(PLAIN).blocks[1].kv
    assert (kv.kind, kv.capacity) == ("static", SLOTS)
    assert [n.name for n in kv.lengths] == ["b1_length"]
    assert [n.args[0].name for n in kv.writes] == ["b1_keys", "b1_values"]


def test_a_growing_cache_is_returned():
    kv = plan_of(dataclasses.replace(PLAIN, cache="grown")).blocks[0].kv
    assert (kv.kind, kv.capacity, kv.lengths) == ("dynamic", None, ())
    assert [shape(n) for n in kv.writes] == [(2, KV_HEADS, 4, DIM)] * 2


class Blocks:
    """Two hand-made blocks that each write a cache ``[1, 2, 8, 4]``."""

    def __init__(self) -> None:
        self.b = GraphBuilder(0)
        self.hidden = self.b.placeholder("hidden", torch.zeros(1, 1, 8))
        self.caches = [self.b.placeholder(f"cache_{i}", torch.zeros(1, 2, 8, 4)) for i in range(2)]
        self.slot = self.b.placeholder("slot", torch.tensor([3]))

    def block(self, i: int, hidden: fx.Node, write: bool = True) -> fx.Node:
        with self.b.module(f"L['self'].layers.{i}"):
            entry = self.b.call("view", hidden, 1, 2, 1, 4)
            if write:
                self.b.call("index_copy_", self.caches[i], 2, self.slot, entry)
            scores = self.b.call("mul", self.caches[i], 0.5)
            self.b.call(operator.iadd, scores, self.caches[i])
            total = self.b.call("sum", scores, (1, 2, 3), True)
            return self.b.call(operator.add, hidden, self.b.call("view", total, 1, 1, 1))

    def found(self, *outputs: fx.Node) -> DecoderPlan | Refusal:
        return find_decoder(normalized(self.b.finish(list(outputs))))


def test_scores_that_are_changed_in_place_are_no_cache():
    """``scores += mask`` writes four dimensions too, but nothing reads them after the block."""
    blocks = Blocks()
    hidden = blocks.b.call(operator.add, blocks.hidden, 1)
    plan = blocks.found(blocks.block(1, blocks.block(0, hidden)))
    assert [n.target for block in plan.blocks for n in block.kv.writes] == [torch.Tensor.index_copy_] * 2


def test_what_reads_a_view_of_a_changed_cache_stays_in_its_place():
    blocks = Blocks()
    view = blocks.b.call("narrow", blocks.caches[0], 2, 0, 1)
    hidden = blocks.block(0, blocks.b.call(operator.add, blocks.hidden, 1))
    late = blocks.b.call("mul", view, 2)
    plan = blocks.found(blocks.block(1, hidden), late)
    parts = {n.name: part for n, part in plan.part_of.items()}
    assert parts[late.name] >= 1


def test_the_first_hidden_state_may_be_an_input():
    """With ``inputs_embeds`` no operation precedes the first block."""
    blocks = Blocks()
    plan = blocks.found(blocks.block(1, blocks.block(0, blocks.hidden)))
    assert plan.blocks[0].hidden_in.name == "hidden"
    assert (plan.batch, plan.query_length) == (1, 1)


def test_blocks_without_a_cache_are_blocks_beside_others_and_none_alone():
    """A tower without caches belongs to the embedding stage; a later block without a cache stays a block."""
    blocks = Blocks()
    hidden = blocks.hidden
    for i in range(3):
        with blocks.b.module(f"L['self'].tower.layers.{i}"):
            hidden = blocks.b.call("neg", hidden)
    plan = blocks.found(blocks.block(1, blocks.block(0, hidden), write=False))
    assert [block.path for block in plan.blocks] == ["layers.0", "layers.1"]
    assert [len(block.kv.writes) for block in plan.blocks] == [1, 0]
    assert [part for n, part in plan.part_of.items() if n.name.startswith("neg")] == [0, 0, 0]


def test_a_state_of_three_dimensions_is_kept_like_keys_and_values():
    """A convolution's inputs are copied in place; a prompt returns a new state, which is not a hidden state."""
    blocks = Blocks()
    state = blocks.b.placeholder("state", torch.zeros(1, 8, 3))
    hidden = blocks.block(0, blocks.b.call("neg", blocks.hidden), write=False)
    with blocks.b.module("L['self'].layers.0"):
        blocks.b.call("copy_", state, blocks.b.call("expand", blocks.b.call("view", hidden, 1, 8, 1), -1, -1, 3))
    out = blocks.block(1, hidden, write=False)
    with blocks.b.module("L['self'].layers.1"):
        new = blocks.b.call(torch.zeros, 1, 8, 3)
        blocks.b.call("copy_", new, state)
    plan = blocks.found(blocks.b.call("neg", out), new)
    assert [block.kv.kind for block in plan.blocks] == ["static", "static"]
    assert [n.target for block in plan.blocks for n in block.kv.writes] == [torch.Tensor.copy_] * 2
    assert plan.blocks[1].hidden_out.name == out.name


def test_a_vmap_stays_in_its_block():
    """Its exit reads nothing and is traced in no module; before the blocks it would have no vmap to exit."""
    blocks = Blocks()
    hidden = blocks.block(0, blocks.b.call("neg", blocks.hidden))
    functions = torch._functorch.predispatch
    with blocks.b.module("L['self'].layers.0"):
        enter = blocks.b.graph.call_function(functions._vmap_increment_nesting, (1, "error"))
        hidden = blocks.b.call("neg", hidden)
    enter.meta["nn_module_stack"] = hidden.meta["nn_module_stack"]
    leave = blocks.b.graph.call_function(functions._vmap_decrement_nesting)
    plan = blocks.found(blocks.block(1, hidden))
    parts = {n.name: part for n, part in plan.part_of.items()}
    assert (parts[enter.name], parts[hidden.name], parts[leave.name]) == (1, 1, 1)


@pytest.mark.parametrize(("place", "axis"), [(0, 2), (2, 1)])
def test_several_streams_in_one_tensor_are_a_hidden_state(place, axis):
    """``[S, B, T, D]`` and ``[B, T, S, D]``; keys that the next block reads have four dimensions too."""
    blocks = Blocks()
    b = blocks.b
    flows = [b.call(torch.stack, [b.call("neg", blocks.hidden)] * 3, place)]
    keys = None
    for i in range(2):
        with b.module(f"L['self'].layers.{i}"):
            b.call(
                "index_copy_",
                blocks.caches[i],
                2,
                blocks.slot,
                b.call("view", b.call("sum", flows[i], place), 1, 2, 1, 4),
            )
            keys = b.call(operator.mul, blocks.caches[i], 0.5 if keys is None else keys)
            flows.append(b.call(operator.add, flows[i], b.call("sum", keys, (0, 1, 2, 3), True)))
    plan = blocks.found(b.call("sum", flows[-1], place))
    assert [block.hidden_out.name for block in plan.blocks] == [node.name for node in flows[1:]]
    assert (plan.token_axis, plan.batch, plan.query_length) == (axis, 1, 1)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda s: s.block(0, s.b.call("neg", s.hidden)), "no decoder layers"),
        (lambda s: s.block(0, s.block(1, s.b.call("neg", s.hidden))), "do not run one after the other"),
        (lambda s: s.block(1, s.block(0, s.b.call("neg", s.hidden), write=False), write=False), "write no KV cache"),
        (
            lambda s: s.block(1, s.block(0, s.b.call("view", s.hidden, 1, 8))),
            "one hidden state must pass from part 0 to part 1",
        ),
    ],
)
def test_other_graphs_are_refused_with_a_reason(build, reason):
    blocks = Blocks()
    refusal = blocks.found(build(blocks))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
