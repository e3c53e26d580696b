"""A program that was written is read as the same program; what cannot be written says why."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx, nn

from river_compile import accelerate
from river_compile.backend import executors_of
from river_compile.store.graphs import Condition, NotStorable, dumps, loads
from tests.support.families import make, prompt


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_segment_reads_and_computes_the_same(name):
    """Targets, arguments, sizes (dynamic ones too), strides, dtypes; slots, and what the graph returns."""
    model = accelerate(make(name, layers=2), lowering="eager", quantizer="rtn", group_size=32)
    model.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=6, do_sample=False)
    executors = executors_of(model)
    assert {executor.decodes for executor in executors} == {True, False}
    for executor in executors:
        before, after = executor.program, loads(dumps(executor.program))
        assert list(map(_calls, after.segments)) == list(map(_calls, before.segments))
        assert list(map(_examples, after.segments)) == list(map(_examples, before.segments))
        assert [(n.name, after.slots[n]) for n in after.slots] == [(n.name, before.slots[n]) for n in before.slots]
        assert [n.name for n in after.returned] == [n.name for n in before.returned]
        assert (after.plan.kind, after.plan.cache) == (before.plan.kind, before.plan.cache)


def test_blocks_that_are_alike_share_a_graph_before_and_after():
    """So a program takes the room, and the time to read, of its distinct parts."""
    torch._dynamo.reset()  # (or cache sizes of earlier tests make some of this one's dynamic)
    model = accelerate(make("llama", layers=3), lowering="native", quantizer="rtn", group_size=32)
    model.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=6, do_sample=False)
    for program in (executor.program for executor in executors_of(model)):
        for found in (program, loads(dumps(program))):
            for alike in filter(None, (found.blocks, found.twins)):
                assert len({id(segment.graph) for segment in alike}) == 1
                assert len({segment.inputs for segment in alike}) == len({segment.outputs for segment in alike}) == 3


def _calls(segment):
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in segment.graph.nodes]


def _examples(segment):
    """Returns what every node's value is like, dynamic sizes as they were when they were traced."""
    return [_like(node.meta.get("example_value")) for node in segment.graph.nodes]


def _like(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, *map(_like, (*value.shape, *value.stride()))
    if isinstance(value, (tuple, list)):
        return [*map(_like, value)]
    return value.node.hint if isinstance(value, torch.SymInt) else value


def test_a_graph_with_a_tensor_of_its_own_is_refused():
    owner = nn.Module()
    owner.constant = torch.ones(2)
    graph = fx.Graph(owner)
    graph.output((graph.get_attr("constant"),))
    with pytest.raises(NotStorable, match="reads constant"):
        dumps(graph)


def test_a_condition_holds_only_if_that_is_certain():
    size, other = sympy.symbols("s0 s1", positive=True, integer=True)
    assert Condition(size < 8).holds({size: sympy.Integer(7)})
    assert not Condition(size < 8).holds({size: sympy.Integer(8)})
    assert not Condition(other < 8).holds({size: sympy.Integer(7)})
