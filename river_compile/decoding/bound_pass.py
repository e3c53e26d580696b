"""A pass of one width that a session runs again: the state of its program, and where its inputs go.

Between a model's call and its graph stands Dynamo. It checks thousands of guards and gathers the graph's inputs from
hundreds of modules, about a millisecond a token. Within one session the same graph runs with the same parameters and
the same cache, and with other ids, masks and positions.

Not handled (such passes go through the model each time): other caches than those of full static layers, and models
whose code does more in a call than to run one graph.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.model_record import GraphRecord
from river_compile.runtime.executor import RiverExecutor, on_call
from river_compile.store.codec import NotStorable
from river_compile.store.inputs import located, named
from river_compile.upstream.dynamo import runs_one_graph

log = logging.getLogger("river_compile.decoding")

# A graph that ran in this thread: its executor, what it was given, and what it returned.
Call = tuple[RiverExecutor, Sequence[Any], tuple]


@contextlib.contextmanager
def graph_calls() -> Iterator[list[Call]]:
    """Collects the calls of rewritten graphs that this thread makes inside."""
    calls: list[Call] = []
    here = threading.get_ident()

    def note(*call: Any) -> None:
        if threading.get_ident() == here:
            calls.append(call)

    with on_call(note):
        yield calls


def locate(
    model: PreTrainedModel,
    graphs: Sequence[GraphRecord],
    inputs: Mapping[str, Any],
    cache: Cache,
    calls: Sequence[Call],
    logits: Tensor,
) -> GraphRecord | None:
    """Finds out where the inputs of a graph come from that Dynamo ran for a call of the model.

    Args:
        model: the model.
        graphs: of the model.
        inputs: what it was given, by name.
        cache: the KV cache among them.
        calls: the graphs that ran.
        logits: what it returned.

    Returns:
        The graph, whose program knows its inputs now; None where a call does more than to run one graph, or where it is
        not known where an input came from.
    """
    if len(calls) != 1:
        return None
    executor, args, outputs = calls[0]
    made = next((i for i, output in enumerate(outputs) if output is logits), None)
    if made is None or executor.entry is None or not runs_one_graph(model, executor.entry.code):
        return None
    graph = next(graph for graph in graphs if graph.executor() is executor)
    assert graph.traced is not None, "Dynamo traced it in this process"
    try:
        executor.locate(located(executor.program, graph.traced, model, args, inputs, cache, made))
    except NotStorable as why:
        log.info("a pass goes through the model each time: %s", why)
        return None
    return graph


class BoundPass:
    """Runs a program again on the cache among its inputs.

    The model is not looked at again: a session's contract says that it does not change.

    Args:
        executor: runs it.
        args: its inputs.
        inputs: of the model's forward, by name, which are among these.
        owned: whether whoever made the inputs writes the next pass's into the same tensors.
    """

    def __init__(self, executor: RiverExecutor, args: Sequence[Any], inputs: Mapping[str, Any], owned: bool) -> None:
        given = enumerate(executor.program.inputs)
        self._given = [(i, known.source.name) for i, known in given if known.source and known.source.kind == "call"]
        args = list(args)
        if not owned:
            for number, _ in self._given:
                args[number] = args[number].clone()
        self.executor, self.state = executor, executor.bind(args)
        self.inputs: Mapping[str, Any] | None = inputs if owned else None  # whose tensors are the state's

    @property
    def args(self) -> Sequence[Any]:
        """The program's inputs."""
        return self.state.slots[: len(self.executor.program.inputs)]

    def serves(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the program may run with these inputs of another session: they look as its own do."""
        values = dict(named(inputs))
        pairs = [(self.state.slots[number], values.get(name)) for number, name in self._given]
        return all(isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)

    def __call__(self, inputs: Mapping[str, Any], depth: int | None, blocks: Tensor | None) -> Tensor:
        """Runs the program with inputs of the same shapes, whose tokens have room in the cache.

        Args:
            inputs: as the model takes them, by name.
            depth: blocks to execute; None leaves it to the exit policy.
            blocks: of the vocabulary whose logits the river's head computes, None for all.

        Returns:
            The logits ``[B, W, V]``, which the next run overwrites.
        """
        state = self.state
        if inputs is not self.inputs:
            values = dict(named(inputs))
            for number, name in self._given:
                state.slots[number].copy_(values[name])
        state.only_logits(blocks)
        self.executor.step(state, depth)
        return state.logits
