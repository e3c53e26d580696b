"""Turns an optimized `RiverProgram` into a `Program`: nodes become numbered slots, graph facts become fields.

Not handled: inputs but ordinary tensors and integers (no example); writes through a view of a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from river_compile.passes.capture_safety import fixed_inputs, obstacle
from river_compile.passes.experts import experts_per_token
from river_compile.passes.nodes import (
    hints_of,
    is_ordinary,
    is_parameter,
    is_tensor,
    mutated_inputs,
    rank,
    source_of,
    value_of,
)
from river_compile.passes.program import (
    CacheRoom,
    Code,
    Example,
    Input,
    LastToken,
    Program,
    Refusal,
    RiverProgram,
    Segment,
    SegmentSpec,
    Size,
    TensorSpec,
)
from river_compile.passes.segments import number_inputs


def freeze(
    program: RiverProgram,
    lower: Callable[[Segment], Code],
    names: Sequence[str],  # of the inputs, in the user's code
    matrices: Sequence[str],
    native: bool,
    width_matters: str,
) -> Program:
    """Return the program without its traced graph; call `lower` once for each graph that segments share."""
    plan, slots, fixed = program.plan, program.slots, fixed_inputs(program.plan)
    shared: dict[fx.Graph, tuple[Code, Refusal | None, tuple[tuple[int, int], ...]]] = {}

    def spec(segment: Segment) -> SegmentSpec:
        if segment.graph not in shared:
            places = {node: place for place, node in enumerate(segment.graph.find_nodes(op="placeholder"))}
            experts = tuple(
                (places[node], count) for node, count in experts_per_token(segment).items() if node in places
            )
            shared[segment.graph] = lower(segment), obstacle(segment, plan.device), experts
        code, why_not, experts = shared[segment.graph]
        return SegmentSpec(
            kind=segment.kind,
            depth=segment.depth,
            code=code,
            inputs=tuple(slots[node] for node in segment.inputs),
            outputs=tuple(slots[node] for node in segment.outputs),
            packed=segment.packed,
            takes_vocab_blocks=segment.takes_vocab_blocks,
            has_score=segment.has_score,
            obstacle=why_not,
            experts=experts,
        )

    inputs = tuple(
        Input(name, to_example(value_of(node)), is_parameter(node), node in fixed)
        for node, name in zip(program.inputs, names, strict=True)
    )
    values = [value_of(node) for node in slots]
    return Program(
        kind="decode" if plan.is_decode else "prefill",
        cache="dynamic" if plan.cache == "dynamic" else "static",
        device=plan.device,
        dtype=value_of(plan.blocks[0].hidden_in).dtype,
        inputs=inputs,
        values=tuple(map(to_example, values[len(inputs) :])),
        hints=tuple(sorted(_hints(values).items(), key=str)),
        prologue=spec(program.prologue),
        blocks=tuple(map(spec, program.blocks)),
        head=spec(program.head),
        twins=tuple(map(spec, program.twins)),
        twin_head=None if program.twin_head is None else spec(program.twin_head),
        candidates=program.candidates,
        kept=program.kept,
        fusions=program.fusions,
        returned=tuple(slots[node] for node in program.returned),
        keys=_keys(program),
        batch=to_size(plan.batch),
        tokens=to_size(plan.query_length),
        capacity=_capacity(program),
        last_token=_last_token(program),
        not_captured=_not_captured(program),
        block_paths=tuple(block.path for block in plan.blocks),
        matrices=tuple(matrices),
        native=native,
        width_matters=width_matters,
    )


def to_size(size: int | torch.SymInt) -> Size:
    if isinstance(size, int):
        return size
    expr: sympy.Expr = size.node.expr
    return expr if expr.free_symbols else int(expr)


def to_example(value: Any) -> Example:
    """Return metadata of a fake tensor or integer, None for other values."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return to_size(value)
    if not isinstance(value, Tensor) or not is_ordinary(value):
        return None
    shape, stride = (tuple(map(to_size, sizes)) for sizes in (value.shape, value.stride()))
    return TensorSpec(shape, stride, value.dtype, value.device, value.requires_grad)


def size_conditions(values: Iterable[object]) -> tuple[sympy.Basic, ...]:
    """Return the guards and ranges of a graph's dynamic sizes; `values` are the examples of its inputs."""
    sizes = [size.node for size in _sizes(values) if isinstance(size, torch.SymInt)]
    if not sizes:
        return ()
    shapes, known = sizes[0].shape_env, {symbol for size in sizes for symbol in size.expr.free_symbols}
    assumed = [shapes.replace(guard.expr) for guard in shapes.guards]
    for symbol, bounds in shapes.var_to_range.items():
        here = shapes.replace(symbol)
        if not known.issuperset(here.free_symbols):  # of no input, such as a capacity that only Python reads
            continue
        assumed += [sympy.Ge(here, bounds.lower)] if bounds.lower.is_Integer else []
        assumed += [sympy.Le(here, bounds.upper)] if bounds.upper.is_Integer else []
    return tuple(expr for expr in dict.fromkeys(assumed) if expr != sympy.true)


def _sizes(values: Iterable[object]) -> list[object]:
    return [
        size
        for value in values
        for size in ((*value.shape, *value.stride()) if isinstance(value, Tensor) and is_ordinary(value) else (value,))
    ]


def _hints(values: Iterable[object]) -> dict[sympy.Symbol, int]:
    hints: dict[sympy.Symbol, int] = {}
    for size in _sizes(values):
        if isinstance(size, torch.SymInt):
            known = hints_of(size.node.shape_env)
            hints |= {symbol: int(known[symbol]) for symbol in size.node.expr.free_symbols if symbol in known}
    return hints


def _keys(program: RiverProgram) -> tuple[int | None, int | None]:
    """Return the slots of the first KV cache tensor before and after a forward; they are one if written in place."""
    plan, slots = program.plan, program.slots
    block = next(b for b in plan.blocks if b.kv.writes)
    kv, part = block.kv, block.index + 1
    targets = [target for write in kv.writes for target in mutated_inputs(write) if target in slots]
    if targets:
        return (slots[targets[0]] if targets[0].op == "placeholder" else None), slots[targets[0]]
    if kv.kind == "static":  # a full sliding window is assembled in a copy first
        return None, None
    write = kv.writes[0]
    stack, before = [write], None
    while stack and before is None:
        node = stack.pop()
        if node.op == "placeholder" and rank(node) == rank(write) and node is not block.hidden_in:
            before = node
        stack += [n for n in node.all_input_nodes if plan.part_of.get(n, part) == part]
    return (None if before is None else slots.get(before)), slots.get(write)


def _capacity(program: RiverProgram) -> CacheRoom | None:
    """Return the room of the first static cache filled from the front, None if it cannot be read."""
    slots = program.slots
    found = (block.kv for block in program.plan.blocks if block.kv.capacity is not None and block.kv.lengths)
    kv = next(found, None)
    if kv is None:
        return None
    length = slots[kv.lengths[0]]
    if isinstance(kv.capacity, int):
        return CacheRoom(length, kv.capacity)
    copied = (n for n in kv.writes if n.target is Tensor.index_copy_ and n.args[0] in slots)
    written = next(copied, None)
    return None if written is None else CacheRoom(length, None, slots[written.args[0]], written.args[1])


def _last_token(program: RiverProgram) -> LastToken | None:
    """Return None if a head reads more of a token than its hidden state, or the caller reads that too."""
    plan, hidden = program.plan, program.plan.blocks[-1].hidden_out
    length = plan.query_length
    symbol = None if isinstance(length, int) else length.node.expr
    holder = number_inputs(program.inputs).get(symbol)
    if holder is None or hidden in program.returned:
        return None
    for head in filter(None, (program.head, program.twin_head)):
        if any(symbol in free_symbols(value_of(n)) for n in head.inputs if n not in (hidden, holder)):
            return None
    return LastToken(program.slots[hidden], program.slots[holder], plan.token_axis)


def _not_captured(program: RiverProgram) -> str | None:
    """Return why no segment can be captured, None if some can."""
    plan = program.plan
    for block in plan.blocks:
        if block.kv.kind != "static":
            where = source_of(block.kv.writes[0])
            return f'the cache grows with every token; cache_implementation="static" keeps it in place (at {where})'
    for block in plan.blocks:
        made = next((c for w in block.kv.writes for c in mutated_inputs(w) if c.op != "placeholder"), None)
        if made is not None:
            return f"the cache is allocated in this forward (at {source_of(made)})"
    for node in (n for segment in program.segments for n in segment.outputs):
        if not isinstance(value_of(node), (Tensor, int, torch.SymInt)):
            return f"segments exchange a value that is neither tensor nor number (at {source_of(node)})"
    written = {node for block in plan.blocks for node in block.kv.writes}
    for node in program.returned:
        if node in written or (node.op == "placeholder" and is_tensor(node)):
            return f"the graph returns a tensor of the caller, which must not become a copy (at {source_of(node)})"
    return None
