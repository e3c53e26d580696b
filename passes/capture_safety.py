"""Finds the inputs whose address a captured graph may keep, and operations that cannot be captured.

Not handled: operators that synchronize with the device internally, since only a run shows that.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from river_compile.passes.nodes import (
    called,
    is_tensor,
    memory_of,
    mutated_inputs,
    source_of,
    value_of,
)
from river_compile.passes.program import DecoderPlan, Refusal, Segment


def fixed_inputs(plan: DecoderPlan) -> frozenset[fx.Node]:
    """Return the placeholders of parameters and of tensors written in place; others may be copied into buffers."""
    graph, marked = plan.graph, "_dynamo_static_input_type"
    written = {memory_of(m) for node in graph.nodes for m in mutated_inputs(node)}
    placeholders = graph.find_nodes(op="placeholder")
    return frozenset(n for n in placeholders if n in written or marked in n.meta.get("tensor_dict", {}))


def obstacle(segment: Segment, home: torch.device) -> Refusal | None:
    """Return why a segment cannot be captured, None if it can; `home` is the device of the hidden state."""
    for node in (n for n in segment.graph.nodes if n.op != "output"):
        value = value_of(node)
        if isinstance(value, (torch.Tensor, torch.SymInt)) and free_unbacked_symbols(value):
            # Captured kernels cannot report a size to the host.
            return Refusal("the size of a value depends on the data", source_of(node))
        if called(node, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy):
            return Refusal("a value is read on the host", source_of(node))
        if is_tensor(node) and value.device != home:  # replaying a copy from host memory repeats the bytes of capture
            return Refusal(f"a value lies on {value.device}, the hidden state on {home}", source_of(node))
    return None
