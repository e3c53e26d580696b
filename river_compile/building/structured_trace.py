"""The passes' changes in torch's structured trace (``TORCH_TRACE=folder``, which tlparse shows).

Artifacts of a "decode" or "prefill" graph: ``river_<kind>_<n>_<pass>``, the segments that a pass changed, before and
after; ``river_<kind>_segments``, as they are compiled; ``river_<kind>_plan``, the decoder that was found.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch._logging import trace_structured

from river_compile.passes.edits import PassRecord
from river_compile.passes.program import Matmul, RiverProgram, Segment
from river_compile.passes.segments import fingerprint


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to the trace, if one is written."""
    trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def trace_pass(kind: str, number: int, record: PassRecord) -> None:
    """Add the segments that a pass changed or made."""
    trace_artifact(f"river_{kind}_{number}_{record.name}", lambda: _changes(record))


def trace_program(kind: str, program: RiverProgram) -> None:
    """Add every segment, and the plan."""
    trace_artifact(
        f"river_{kind}_segments", lambda: "".join(_text(segment, "compiled") for segment in program.segments)
    )
    trace_artifact(f"river_{kind}_plan", lambda: plan_text(program))


def plan_text(program: RiverProgram) -> str:
    """Describe the decoder's layers with their KV caches, its segments, and the 16-bit weights."""
    plan = program.plan
    lines = [
        f"{plan.num_blocks} layers, batch {plan.batch}, {plan.query_length} tokens per row",
        f"exit checks after layers: {', '.join(map(str, program.candidates)) or 'none'}",
        "",
    ]
    flows = [f"{block.hidden_in.name} -> {block.hidden_out.name}" for block in plan.blocks]
    wide = max(28, *map(len, flows))
    lines.append(f"{'layer':<32} {'hidden state':<{wide}} {'KV cache':<8} writes")
    for block, flow in zip(plan.blocks, flows, strict=True):
        writes = ", ".join(n.name for n in block.kv.writes)
        lines.append(f"{block.path:<32} {flow:<{wide}} {block.kv.kind:<8} {writes}")
    lines += ["", f"{'segment':<12} {'function':<18} inputs outputs 4-bit matmuls"]
    for s in program.segments:
        lines.append(
            f"{s.name:<12} {fingerprint(s).digest:<18} {len(s.inputs):>6} {len(s.outputs):>7} {len(s.packed):>14}"
        )
    lines += ["", "segments with the same function are compiled once"]
    lines += [f"in 16 bits: {kept.name}: {kept.reason}" for kept in program.kept]
    return "\n".join(lines) + "\n"


def _changes(record: PassRecord) -> str:
    before, texts = {segment.name: segment for segment in record.before.segments}, []
    for segment in record.after.segments:
        old = before.get(segment.name)
        if old is not segment:
            texts += [_text(old, "before")] if old is not None else []
            texts.append(_text(segment, "after"))
    return "".join(texts)


def _text(segment: Segment, when: str) -> str:
    """Return a line ``# NAME WHEN``, the packed matmuls' names and the segment's graph as Python code."""
    sites = [_site_line(*site) for site in enumerate(segment.packed)]
    module = fx.GraphModule(segment.graph.owning_module, segment.copy().graph, class_name="Segment")
    return "\n".join([f"# {segment.name} {when}", *sites, module.print_readable(print_output=False), ""])


def _site_line(number: int, linear: Matmul) -> str:
    if linear.lossless:
        return f"#   {linear.layout} matmul {number}: {linear.name}"
    return f"#   4-bit matmul {number}: {linear.name}, groups of {linear.group_size}"
