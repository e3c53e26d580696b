"""Writes a rewritten graph to a folder for reading: every segment as code, each twin beside its block, and the plan."""

from __future__ import annotations

from pathlib import Path

from river_compile.errors import OptionError
from river_compile.passes.program import RiverProgram, Segment
from river_compile.passes.segments import fingerprint


def dump_program(program: RiverProgram, folder: str | Path, kind: str) -> Path:
    """Writes the program below ``folder/kind_N``, N the first number that is free; returns that folder.

    Raises:
        OptionError: (a ``ValueError``) the folder takes no files.
    """
    root = Path(folder)
    try:
        target = next(path for n in range(1, 10**6) if not (path := root / f"{kind}_{n}").exists())
        target.mkdir(parents=True)
    except OSError as error:
        raise OptionError(f"dump_dir={str(folder)!r} takes no files ({error.strerror}); name another folder") from error
    (target / "plan.txt").write_text(_plan_text(program))
    for segment in program.segments:
        (target / f"{segment.name}.py").write_text(_segment_text(segment))
    return target


def _plan_text(program: RiverProgram) -> str:
    plan = program.plan
    lines = [
        f"{plan.num_blocks} blocks, batch {plan.batch}, {plan.query_length} tokens per row",
        f"exit checks after blocks: {', '.join(map(str, program.candidates)) or 'none'}",
        "",
        f"{'block':<32} {'hidden state':<28} {'KV cache':<8} writes",
    ]
    for block in plan.blocks:
        writes = ", ".join(n.name for n in block.kv.writes)
        flow = f"{block.hidden_in.name} -> {block.hidden_out.name}"
        lines.append(f"{block.path:<32} {flow:<28} {block.kv.kind:<8} {writes}")
    lines += ["", f"{'segment':<12} {'function':<18} inputs outputs 4-bit products"]
    for s in program.segments:
        lines.append(
            f"{s.name:<12} {fingerprint(s).digest:<18} {len(s.inputs):>6} {len(s.outputs):>7} {len(s.packed):>14}"
        )
    lines += ["", "segments with the same function are compiled once"]
    lines += [f"in 16 bits: {kept.name}: {kept.reason}" for kept in program.kept]
    return "\n".join(lines) + "\n"


def _segment_text(segment: Segment) -> str:
    head = [f"# {segment.name}"]
    head += [
        f"#   4-bit product {i}: {site.name}, groups of {site.group_size}" for i, site in enumerate(segment.packed)
    ]
    return "\n".join(head) + "\n" + segment.graph_module.print_readable(print_output=False) + "\n"
