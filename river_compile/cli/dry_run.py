"""What the backend would make of a model, worked out from its config: no weight is read, nothing is compiled.

The model is built on torch's meta device, which has shapes and no memory, and traced once as a prompt and once as a
decode step. What it costs to read the weights of a token is counted from the shapes.

Not handled: what only shows at a real prompt, such as a graph that breaks for some inputs.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from transformers import AutoModelForCausalLM, PretrainedConfig, StaticCache

from river_compile.choose_passes import twinning
from river_compile.cli.models import config_of, loading
from river_compile.config import RiverConfig
from river_compile.kernels.quant.aten_int4 import LAYOUT as ATEN_LAYOUT
from river_compile.lowering.choose import Lowering
from river_compile.passes.decoder import find_decoder
from river_compile.passes.nodes import is_parameter, value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import LinearSite, Refusal, RiverProgram, Segment
from river_compile.passes.segments import segmented
from river_compile.passes.twins import twin_sites, without_products
from river_compile.upstream.transformers import cache_argument

_PROMPT, _SLOTS = 8, 32
_BYTES_OF_GROUP = 4  # a scale and a zero in 16 bits


@dataclass(frozen=True)
class DryRun:
    """What would become of a model.

    Attributes:
        graphs: for "prefill" and "decode" the number of blocks that were found, or why nothing was.
        refusal: why decode steps would not be rewritten; empty where they would.
        twins: the products of the twins that become 4-bit ones.
        block_bytes, twin_bytes, head_bytes: read for each token, by all blocks, by all twins, by the head.
    """

    graphs: dict[str, int | str]
    refusal: str
    blocks: int
    twins: tuple[LinearSite, ...]
    block_bytes: int
    twin_bytes: int
    head_bytes: int
    parameters: int

    def bytes_per_token(self, depth: int) -> float:
        """Returns the weights that a token reads which leaves after `depth` blocks."""
        share = depth / self.blocks
        return share * self.block_bytes + (1 - share) * self.twin_bytes + self.head_bytes


def dry_run(folder: Path, dtype: str, config: RiverConfig) -> DryRun:
    """Traces a model's prompt and decode step without weights.

    Raises:
        ValueError: the folder has no config of a causal language model.
    """
    model_config = config_of(folder)
    with loading(folder), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype)).eval()
    found = _trace(model, model_config)
    graphs: dict[str, int | str] = {}
    for kind, program in zip(("prefill", "decode"), found, strict=True):
        graphs[kind] = str(program) if isinstance(program, Refusal) else program.plan.num_blocks
    parameters = sum(p.numel() for p in model.parameters())
    program = found[1]
    if isinstance(program, Refusal):
        return DryRun(graphs, str(program), 0, (), 0, 0, 0, parameters)
    how = twinning(config, Lowering("inductor", ATEN_LAYOUT, fuse=False))
    assert how is not None, "the default quantizer makes twins"
    sites = [site for block in program.blocks for site in twin_sites(block, how)]
    packed = {weight for site in sites for weight in site.weights}
    return DryRun(
        graphs=graphs,
        refusal="",
        blocks=program.plan.num_blocks,
        twins=tuple(sites),
        block_bytes=_bytes(program.blocks),
        twin_bytes=_bytes(program.blocks, without=packed) + sum(map(_packed_bytes, sites)),
        head_bytes=_bytes([program.head]),
        parameters=parameters,
    )


def _trace(model: Any, config: PretrainedConfig) -> list[RiverProgram | Refusal]:
    """Returns what was found in the graph of a prompt and of a decode step."""
    found: list[RiverProgram | Refusal] = []

    def look(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        plan = find_decoder(normalized(graph_module))
        program = plan if isinstance(plan, Refusal) else segmented(plan)
        found.append(program if isinstance(program, Refusal) else without_products(program) or program)
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
            except Exception as error:  # whatever a model's code does with tensors that hold nothing
                line = " ".join(str(error).split())[:200]
                why = Refusal(f"its code does not run without weights: {type(error).__name__}: {line}")
                found.extend(() if found else (why,))  # (what was traced before says more)
            results.append(_largest(found))
    return results


def _largest(found: list[RiverProgram | Refusal]) -> RiverProgram | Refusal:
    """Returns the program among the graphs that a forward pass was traced to, else the last refusal."""
    programs = [program for program in found if isinstance(program, RiverProgram)]
    return (programs or found or [Refusal("the model has no graph that Dynamo traces")])[-1]


def _bytes(segments: Iterable[Segment], without: Iterable[fx.Node] = ()) -> int:
    left_out = set(without)
    nodes = {n for segment in segments for n in segment.inputs if is_parameter(n) and n not in left_out}
    values: dict[int, Tensor] = {id(value): value for value in map(value_of, nodes)}
    return sum(value.numel() * value.element_size() for value in values.values())


def _packed_bytes(site: LinearSite) -> int:
    weights = sum(site.out_features) * site.in_features * max(site.experts, 1)
    return weights // 2 + _BYTES_OF_GROUP * weights // site.group_size


def bandwidth(megabytes: int = 256, repeats: int = 6) -> float:
    """Measures how many bytes per second this machine's memory gives to a sum: the best of many short reads.

    One that takes a fraction of a millisecond is over before the scheduler lets another process have the core, however
    busy the machine is. All together are more than most caches hold, so that each comes from memory.
    """
    pieces = torch.ones(megabytes << 18, dtype=torch.float32).split(1 << 20)
    best = float("inf")
    for piece in pieces * repeats:
        start = time.perf_counter()
        piece.sum()
        best = min(best, time.perf_counter() - start)
    return pieces[0].nbytes / best
