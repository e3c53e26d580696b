"""Derives from the graph alone the invariants of a step that is captured as a CUDA graph.

These are which inputs keep their address from token to token, and which operations cannot be captured.

Not handled: what only shows when the code runs, such as an operator that waits for the device inside.
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
    """Returns the placeholders whose memory the caller keeps: parameters, and tensors written in place.

    All others may be copied into a buffer, because nobody looks at them after the step.
    """
    graph, marked = plan.graph, "_dynamo_static_input_type"
    written = {memory_of(m) for node in graph.nodes for m in mutated_inputs(node)}
    placeholders = graph.find_nodes(op="placeholder")
    return frozenset(n for n in placeholders if n in written or marked in n.meta.get("tensor_dict", {}))


def obstacle(segment: Segment, home: torch.device) -> Refusal | None:
    """Returns why a segment cannot be captured, naming the node and its source line; None if it can.

    Captured kernels cannot report a size to the host, and a captured copy from ordinary host memory would repeat the
    bytes that lay there at capture. `home` is the device of the hidden state.
    """
    for node in (n for n in segment.graph.nodes if n.op != "output"):
        value = value_of(node)
        if isinstance(value, (torch.Tensor, torch.SymInt)) and free_unbacked_symbols(value):
            return Refusal("the size of a value depends on the data", source_of(node))
        if called(node, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy):
            return Refusal("a value is read on the host", source_of(node))
        if is_tensor(node) and value.device != home:
            return Refusal(f"a value lies on {value.device}, the hidden state on {home}", source_of(node))
    return None
