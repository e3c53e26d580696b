"""Graphs that are not rewritten: why, what the user hears of it, and what runs instead.

Not handled: why a rewritten graph loses parts, which each pass reports.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from river_compile.building.graph_record import BROKE, GraphRecord, Graphs
from river_compile.config import RiverConfig
from river_compile.errors import RiverWarning, UnsupportedGraphError
from river_compile.kernels.messages import with_id
from river_compile.lowering.lower import no_compiler
from river_compile.passes.program import Refusal
from river_compile.upstream.dynamo import OwnCall, last_graph_break, untraceable


def obstacle(config: RiverConfig, model: nn.Module | None, example_inputs: Sequence[Any]) -> Refusal | None:
    """Return why no graph of a model can be rewritten, whatever it computes; None if it may be."""
    why = "" if model is None else untraceable(model)
    if why:
        return Refusal(why)
    torch_alone = config.runs_by_operator and not config.packs_twins
    if not torch_alone and any(_is_float64_weight(x) for x in example_inputs):
        return Refusal("its weights are float64, which no kernel of River takes; call model.to(torch.bfloat16)")
    return _needs_gradients(example_inputs)


def _is_float64_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and x.dtype == torch.float64


def _needs_gradients(example_inputs: Sequence[Any]) -> Refusal | None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        return Refusal("the graph needs gradients; run generation under torch.no_grad() or torch.inference_mode()")
    return None


def runs_instead(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], graph: GraphRecord, graphs: Graphs, id: str
) -> Callable[..., Any]:
    """Return what runs a graph that is refused: Inductor's code, or the graph itself if nothing compiles.

    Args:
        graph_module: the traced graph.
        example_inputs: its inputs.
        graph: its record, with the refusal.
        graphs: the model's records; a reason that one of them had before is not repeated.
        id: "RC100" if a compiler is the cause, else "RC021".

    Raises:
        UnsupportedGraphError: with ``on_unsupported="raise"``.
    """
    config = graph.config
    plainly = config.runs_by_operator or no_compiler(config, example_inputs, rewritten=False) is not None
    failed = "Could not compile River's C++ kernels" if id == "RC100" else "backend='river' cannot rewrite this graph"
    if config.on_unsupported == "raise":
        raise UnsupportedGraphError(f"{failed}: {graph.refusal}", id="RC100" if id == "RC100" else "RC020")
    if graph.refusal not in {other.refusal for other in graphs if other is not graph}:
        runs = "the model runs uncompiled" if plainly else "Inductor runs the model, without River"
        warnings.warn(with_id(id, f"{failed}, so {runs}: {graph.refusal}"), RiverWarning, stacklevel=2)
    if plainly:
        return graph_module.forward
    from river_compile.lowering.inductor import compile_whole

    return compile_whole(graph_module, example_inputs, graph.mode)


def graph_break(graph_module: fx.GraphModule, model: nn.Module | None, own: OwnCall | None) -> str:
    """Return where Dynamo broke the model's code, if this graph is a piece of it; else an empty text."""
    why = getattr(graph_module, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        why = None if model is None else last_graph_break(model, own)
    if why is None:
        return ""
    line = f" ({Path(why.user_stack[-1].filename).name}:{why.user_stack[-1].lineno})" if why.user_stack else ""
    return f", as {BROKE}: {why.reason.partition(chr(10))[0]}{line}"
