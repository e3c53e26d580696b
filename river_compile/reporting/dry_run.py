"""Predicts from a model's config how River would rewrite it, and the bytes that a token reads.

The model is built on the meta device and traced as a prompt and as a decode step; no weight is read.
Not handled: graph breaks that depend on a real prompt.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from river_compile.config import RiverConfig
from river_compile.decoding.kv_cache import why_no_rewind
from river_compile.kernels.quant.layouts import PLAIN_LAYOUT
from river_compile.kernels.quant.mxfp4 import GROUP, LAYOUT_MXFP4, Mxfp4Stack, mxfp4_parts
from river_compile.passes.experts import experts_per_token
from river_compile.passes.nodes import is_parameter, value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Matmul, Refusal, RiverProgram, Segment
from river_compile.passes.segments import recognise
from river_compile.passes.twins import TwinSpec, twin_layers
from river_compile.tracing.layers import Layers, layers_of, with_layers
from river_compile.upstream.transformers import cache_argument, full_static_cache, merged_stacks

_PROMPT, _SLOTS = 8, 32
_BYTES_OF_GROUP = 4  # scale and zero-point in 16 bits
_PARTS = ((GROUP // 2,), ())  # dimensions of a group's numbers and of its scale, in MXFP4


def empty_model(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """Build a model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def with_mxfp4_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Have a model on the meta device hold its stacks of experts in MXFP4, as `load_mxfp4` does."""
    for module in model.modules():
        for name, stack in list(module.named_parameters(recurse=False)):
            if stack.dim() == 3 and stack.shape[1] % GROUP == 0:
                experts, k, n = stack.shape
                parts = (torch.empty(experts, n, k // GROUP, *of, dtype=torch.uint8, device="meta") for of in _PARTS)
                setattr(module, name, nn.Parameter(Mxfp4Stack(*parts), requires_grad=False))
    return model


def dry_run(model: PreTrainedModel) -> dict[str, Any]:
    """Trace prompt and decode step of a model on the meta device; part of the result of ``river check``.

    "exact_refusal" says why exact mode, the default, runs on plain transformers; None if it does not. "drafts_refusal"
    says why it decodes without drafts, on River's kernels.
    "graphs" has for "prefill" and "decode" the number of blocks, or the reason that they are unsupported. "bytes" has
    the weights that a token reads in all blocks, all twins and the head, None if decode steps are unsupported.
    "experts" has the bytes of experts in MXFP4 that a token chooses, and of all; None without such. "inactive" has the
    bytes of other experts that a token does not choose, in all blocks and all twins. "merged" has the bytes of stacks
    that transformers makes from a checkpoint's matrices.
    """
    all_experts = sum(_bytes_of(p) for p in model.parameters() if mxfp4_parts(p) is not None)
    parameters = sum(p.numel() for p in model.parameters())
    layers = layers_of(model)
    programs, repeats = [], []
    if isinstance(layers, Layers):
        chosen = sorted({*layers.kinds, 1})  # the first of each kind, and two at least
        stands = [index if index in chosen else first for index, first in enumerate(layers.kinds)]
        repeats = [stands.count(index) for index in chosen]
        programs = _trace(with_layers(model, layers.path, chosen), model)
    if not programs or any(isinstance(p, Refusal) or p.plan.num_blocks != len(repeats) for p in programs):
        whole = _trace(model, model)  # its code needs all layers, or its blocks are not its layers
        # Of two refusals the first one says more: Dynamo continues with what the first trace left.
        programs = programs if programs and _refused(programs) and _refused(whole) else whole
        repeats = [1] * max((p.plan.num_blocks for p in programs if isinstance(p, RiverProgram)), default=0)
    prefill, decode = programs
    why_not = drafts_refusal(model) or None
    found: dict[str, Any] = {
        "parameters": parameters,
        "exact_refusal": why_not if model._is_stateful else None,  # before the prompt; other caches can be decoded on
        "drafts_refusal": None if model._is_stateful else why_not,
        "graphs": {"prefill": _outcome(prefill, repeats), "decode": _outcome(decode, repeats)},
        "merged": sum(_bytes_of(stack) for stack in merged_stacks(model) if mxfp4_parts(stack) is None),
    }
    if isinstance(decode, Refusal):
        nothing = dict.fromkeys(("bytes", "experts", "inactive"))
        return found | {"refusal": str(decode), "blocks": 0, "twin_matmuls": 0} | nothing
    how = TwinSpec(RiverConfig().group_size, PLAIN_LAYOUT)
    twinned = twin_layers(how)(decode)
    assert isinstance(twinned, RiverProgram), "the pass of twins refuses nothing"
    sites = [twin.packed for twin in twinned.twins]
    packed = {decode.inputs[weight] for linears in sites for linear in linears for weight in linear.weights}
    blocks, twins = ([_bytes([block], without) for block in decode.blocks] for without in ((), packed))
    of_experts = _total(repeats, [_bytes([block], only_mxfp4=True) for block in decode.blocks])
    pairs = [*zip(sites, decode.blocks, strict=True)]
    four_bits = [sum(_packed_bytes(linear, _active(linear, block)) for linear in linears) for linears, block in pairs]
    all_in_four = [sum(_packed_bytes(linear, math.prod(linear.shape)) for linear in linears) for linears in sites]
    return found | {
        "refusal": None,
        "blocks": sum(repeats),
        "twin_matmuls": _total(repeats, map(len, sites)),
        "bytes": {
            "blocks": _total(repeats, blocks),
            "twins": _total(repeats, twins) + _total(repeats, four_bits),
            "head": _bytes([decode.head]),
        },
        "experts": {"layout": LAYOUT_MXFP4, "chosen": of_experts, "all": all_experts} if all_experts else None,
        "inactive": {
            "blocks": _total(repeats, map(_inactive_bytes, decode.blocks)),
            "twins": _total(repeats, all_in_four) - _total(repeats, four_bits),
        },
    }


def drafts_refusal(model: PreTrainedModel) -> str:
    """Return why exact mode cannot draft for a model, as far as its configuration tells; empty where it can."""
    with contextlib.suppress(ValueError, KeyError):  # a configuration that transformers makes no static cache for
        return why_no_rewind(model, full_static_cache(model, _SLOTS))
    return why_no_rewind(model)


def _total(repeats: Sequence[int], values: Iterable[int]) -> int:
    return sum(count * value for count, value in zip(repeats, values, strict=True))


def _refused(programs: Iterable[RiverProgram | Refusal]) -> bool:
    return all(isinstance(program, Refusal) for program in programs)


def _outcome(found: RiverProgram | Refusal, repeats: Sequence[int]) -> int | str:
    return str(found) if isinstance(found, Refusal) else sum(repeats)


def _trace(model: Any, whole: PreTrainedModel) -> list[RiverProgram | Refusal]:
    """Return the programs, or refusals, of a prompt's and of a decode step's graph; `model` has layers of `whole`."""
    found: list[RiverProgram | Refusal] = []

    def look(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(recognise(normalized(graph_module)))
        return graph_module.forward

    with torch.device("meta"), torch.no_grad():
        cache = full_static_cache(whole, _SLOTS)  # as `generate` decodes: no window is full after the prompt
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


def _bytes(segments: Iterable[Segment], without: Iterable[fx.Node] = (), only_mxfp4: bool = False) -> int:
    """Return the bytes of weights that a token reads; of experts, those of the chosen ones."""
    read = {id(value): size for value, size in _reads(segments, without) if not only_mxfp4 or mxfp4_parts(value)}
    return sum(read.values())


def _inactive_bytes(segment: Segment) -> int:
    """Return the bytes of experts that a token does not choose, but for those in MXFP4."""
    left = {id(value): _bytes_of(value) - size for value, size in _reads([segment]) if mxfp4_parts(value) is None}
    return sum(left.values())


def _reads(segments: Iterable[Segment], without: Iterable[fx.Node] = ()) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameters of segments, each with the bytes that a token reads of it."""
    left_out = set(without)
    for segment in segments:
        chosen = experts_per_token(segment)
        for node, placeholder in zip(segment.inputs, segment.graph.find_nodes(op="placeholder"), strict=False):
            if is_parameter(node) and node not in left_out:
                value = value_of(node)
                share = min(chosen.get(placeholder, len(value)), len(value)) / max(len(value), 1)
                yield value, int(_bytes_of(value) * share)


def _bytes_of(value: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in mxfp4_parts(value) or (value,))


def _active(matmul: Matmul, segment: Segment) -> int:
    """Return the number of a matmul's weights that a token reads."""
    weights = math.prod(matmul.shape)
    if not matmul.experts:
        return weights
    return weights * min(experts_per_token(segment).values(), default=matmul.experts) // matmul.experts


def _packed_bytes(matmul: Matmul, weights: int) -> int:
    """Return the bytes of so many 4-bit weights of a matmul."""
    return weights // 2 + _BYTES_OF_GROUP * weights // matmul.group_size
