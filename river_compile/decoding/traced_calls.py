"""What a call of the model ran: the graphs that Dynamo traced for it, and where the inputs of one came from.

Not handled (such passes go through the model each time): caches that grow, whose graphs return longer ones, and models
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

from river_compile.compile_cache.codec import NotCacheable
from river_compile.compile_cache.programs import with_sources
from river_compile.model_record import GraphRecord
from river_compile.runtime.executor import RiverExecutor, on_call
from river_compile.upstream.dynamo import OwnCall, runs_one_graph

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
    own: OwnCall | None,
) -> GraphRecord | None:
    """Finds out where the inputs of a graph come from that Dynamo ran for a call of the model.

    Args:
        model: the model.
        graphs: of the model.
        inputs: what it was given, by name.
        cache: the KV cache among them.
        calls: the graphs that ran.
        logits: what it returned.
        own: the model's own compiled call, through which it went; None: it went through the model's.

    Returns:
        The graph, whose program knows its inputs now; None where a call does more than to run one graph, or where it is
        not known where an input came from.
    """
    if len(calls) != 1:
        return None
    executor, args, outputs = calls[0]
    made = next((i for i, output in enumerate(outputs) if output is logits), None)
    if made is None or not runs_one_graph(model, executor.code, own):
        return None
    graph = next(graph for graph in graphs if graph.executor() is executor)
    assert graph.traced is not None, "Dynamo traced it in this process"
    try:
        executor.locate(with_sources(executor.program, graph.traced, model, args, inputs, cache, made))
    except NotCacheable as why:
        log.info("a pass goes through the model each time: %s", why)
        return None
    return graph
