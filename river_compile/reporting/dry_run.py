"""Predicts from a model's config how River would rewrite it, and the bytes that a token reads.

The model is built on the meta device and traced as a prompt and as a decode step; no weight is read.
Not handled: graph breaks that depend on a real prompt.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, StaticCache

from river_compile.choices import choose
from river_compile.config import RiverConfig
from river_compile.kernels.quant.layouts import PLAIN_LAYOUT
from river_compile.lowering.inductor import Lowering
from river_compile.passes.nodes import is_parameter, value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Matmul, Refusal, RiverProgram, Segment
from river_compile.passes.segments import recognise
from river_compile.passes.twins import river_twins
from river_compile.upstream.transformers import cache_argument

_PROMPT, _SLOTS = 8, 32
_BYTES_OF_GROUP = 4  # scale and zero-point in 16 bits


def empty_model(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """Build a model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def dry_run(model: PreTrainedModel) -> dict[str, Any]:
    """Trace prompt and decode step of a model on the meta device; part of the result of ``river check``.

    "graphs" has for "prefill" and "decode" the number of blocks, or the reason that they are unsupported; "bytes" the
    weights that a token reads in all blocks, all twins and the head, None if decode steps are unsupported.
    """
    prefill, decode = _trace(model, model.config)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "graphs": {"prefill": _outcome(prefill), "decode": _outcome(decode)},
    }
    if isinstance(decode, Refusal):
        return found | {"refusal": str(decode), "blocks": 0, "twin_matmuls": 0, "bytes": None}
    how = choose(decode, RiverConfig(), Lowering("inductor", PLAIN_LAYOUT, fuse=False)).twinning
    twinned = river_twins(how)(decode)
    assert isinstance(twinned, RiverProgram), "the pass of twins refuses nothing"
    sites = [linear for twin in twinned.twins for linear in twin.packed]
    packed = {decode.inputs[weight] for linear in sites for weight in linear.weights}
    return found | {
        "refusal": None,
        "blocks": decode.plan.num_blocks,
        "twin_matmuls": len(sites),
        "bytes": {
            "blocks": _bytes(decode.blocks),
            "twins": _bytes(decode.blocks, without=packed) + sum(map(_packed_bytes, sites)),
            "head": _bytes([decode.head]),
        },
    }


def _outcome(found: RiverProgram | Refusal) -> int | str:
    return str(found) if isinstance(found, Refusal) else found.plan.num_blocks


def _trace(model: Any, config: PretrainedConfig) -> list[RiverProgram | Refusal]:
    """Return the programs, or refusals, of a prompt's and of a decode step's graph."""
    found: list[RiverProgram | Refusal] = []

    def look(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(recognise(normalized(graph_module)))
        return graph_module.forward

    with torch.device("meta"), torch.no_grad():
        cache = StaticCache(config=config.get_text_config(), max_cache_len=_SLOTS)
        held: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        forward = torch.compile(model.forward, backend=look, dynamic=False)
        results = []
        for length, start in ((_PROMPT, 0), (1, _PROMPT)):
            found.clear()
            if takes_positions:
                held["position_ids"] = torch.arange(start, start + length)[None]
            try:
                forward(input_ids=torch.ones(1, length, dtype=torch.long), **held)
            except Exception as error:  # of the model's code, given tensors without values
                line = " ".join(str(error).split())[:200]
                why = Refusal(f"its code does not run without weights: {type(error).__name__}: {line}")
                found.extend(() if found else (why,))  # an earlier graph says more
            results.append(_largest(found))
    return results


def _largest(found: list[RiverProgram | Refusal]) -> RiverProgram | Refusal:
    """Return the program among the graphs of a forward pass, else the last refusal."""
    programs = [program for program in found if isinstance(program, RiverProgram)]
    return (programs or found or [Refusal("the model has no graph that Dynamo traces")])[-1]


def _bytes(segments: Iterable[Segment], without: Iterable[fx.Node] = ()) -> int:
    left_out = set(without)
    nodes = {n for segment in segments for n in segment.inputs if is_parameter(n) and n not in left_out}
    values: dict[int, Tensor] = {id(value): value for value in map(value_of, nodes)}
    return sum(value.numel() * value.element_size() for value in values.values())


def _packed_bytes(site: Matmul) -> int:
    weights = sum(site.out_features) * site.in_features * max(site.experts, 1)
    return weights // 2 + _BYTES_OF_GROUP * weights // site.group_size


def bandwidth(megabytes: int = 256, repeats: int = 6) -> float:
    """Measure the memory's bandwidth in bytes per second: the best of many short reads."""
    # A read of a fraction of a millisecond ends before the scheduler gives the core to another process. Together they
    # exceed most caches, so each read comes from memory.
    pieces = torch.ones(megabytes << 18, dtype=torch.float32).split(1 << 20)
    best = float("inf")
    for piece in pieces * repeats:
        start = time.perf_counter()
        piece.sum()
        best = min(best, time.perf_counter() - start)
    return pieces[0].nbytes / best
