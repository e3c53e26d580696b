"""Traces a few layers in place of all: the first and the last of each kind, from which the others are stamped.

Not handled (a Refusal): models whose layers mostly differ from each other, and calls that do more than run one graph.
"""

from __future__ import annotations

import torch

from river_compile.passes.nodes import value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Refusal, Source
from river_compile.passes.stamp import Template
from river_compile.tracing.forward import Forward
from river_compile.tracing.layers import layers_of, with_layers
from river_compile.upstream.dynamo import trace
from river_compile.upstream.transformers import mark_dynamic


def trace_template(forward: Forward) -> Template | Refusal:
    """Trace some layers on a pass's inputs, without running them."""
    model, sources = forward.model, forward.sources
    layers = layers_of(model, forward.cache)
    if isinstance(layers, Refusal):
        return layers
    path, kinds = layers.path, layers.kinds
    lasts = [len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds]
    traced = sorted({*kinds, *lasts})
    if 2 * len(traced) > len(kinds) or len(traced) < 2:
        return Refusal(f"{len(traced)} of its {len(kinds)} layers would be traced", path)
    mark_dynamic(forward.inputs)
    try:
        found = trace(with_layers(model, path, traced), forward.inputs)
    except Exception as error:  # of the model's code, which may need all of its layers
        return Refusal(f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}", path)
    if found is None:
        return Refusal("a call of the model does more than run one graph")
    normal, args = normalized(found[0]), found[1]
    nodes = normal.graph.find_nodes(op="placeholder")
    known = {node: sources[id(arg)] for node, arg in zip(nodes, args, strict=True) if id(arg) in sources}
    known |= {node: Source("size") for node in nodes if isinstance(value_of(node), (int, torch.SymInt))}
    if len(known) < len(nodes):
        name = next(node.name for node in nodes if node not in known)
        return Refusal("it is not a parameter, a field of the KV cache, an argument or a size", name)
    return Template(normal, known, path, tuple(traced), tuple(map(traced.index, kinds)))
