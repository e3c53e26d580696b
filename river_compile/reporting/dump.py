"""Writes a graph on its way through the passes, for reading: to a folder, and to torch's structured trace.

    <kind>_<N>/plan.txt                           the decoder that was found, and its segments
    <kind>_<N>/<segment>.py                       every segment as the backend compiles it
    <kind>_<N>/passes/<n>_<pass>/<segment>.*.py   what each pass changed: `before` (a new segment has none) and `after`

The structured trace (``TORCH_TRACE=folder``, which tlparse shows) receives the plan and what each pass changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import fx
from torch._logging import trace_structured

from river_compile.errors import OptionError
from river_compile.passes.pipeline import PassRecord
from river_compile.passes.program import Matmul, RiverProgram, Segment
from river_compile.passes.segments import fingerprint


class PassDump:
    """Writes one traced graph, of kind "decode" or "prefill"; without a folder to the structured trace alone.

    Raises:
        OptionError: (a ``ValueError``) the folder takes no files.
    """

    def __init__(self, folder: str | Path | None, kind: str) -> None:
        self._kind = kind
        self._passes = 0
        self.folder = None if folder is None else _new_folder(Path(folder), kind)

    def after_pass(self, record: PassRecord) -> None:
        """Writes the segments that a pass changed."""
        self._passes += 1
        name = f"{self._passes}_{record.name}"
        trace_artifact(f"river_{self._kind}_{name}", lambda: "\n".join(text for _, text in _changes(record)))
        if self.folder is not None:
            target = self.folder / "passes" / name
            target.mkdir(parents=True)
            for file, text in _changes(record):
                (target / file).write_text(text)

    def program(self, program: RiverProgram) -> None:
        """Writes the plan, and every segment as it will be compiled."""
        trace_artifact(f"river_{self._kind}_plan", lambda: plan_text(program))
        if self.folder is not None:
            (self.folder / "plan.txt").write_text(plan_text(program))
            for segment in program.segments:
                (self.folder / f"{segment.name}.py").write_text(segment_text(segment))


def _new_folder(root: Path, kind: str) -> Path:
    try:
        folder = next(path for n in itertools.count(1) if not (path := root / f"{kind}_{n}").exists())
        folder.mkdir(parents=True)
    except OSError as error:
        why = f"takes no files ({error.strerror}); name another folder"
        raise OptionError(f"dump_dir={str(root)!r} {why}") from error
    return folder


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Adds a text to torch's structured trace; it is made only if one is written."""
    trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def plan_text(program: RiverProgram) -> str:
    """Returns the decoder's blocks with their KV caches, its segments, and the matrices in 16 bits."""
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


def segment_text(segment: Segment) -> str:
    """Returns a segment's graph as Python code, its packed matmuls named above it."""
    sites = [_site_line(*site) for site in enumerate(segment.packed)]
    module = fx.GraphModule(segment.graph.owning_module, segment.copy().graph, class_name="Segment")
    return "\n".join([f"# {segment.name}", *sites, module.print_readable(print_output=False), ""])


def _changes(record: PassRecord) -> Iterator[tuple[str, str]]:
    """Yields a file name and its text for every segment that a pass changed or made."""
    before = {segment.name: segment for segment in record.before.segments}
    for segment in record.after.segments:
        old = before.get(segment.name)
        if old is not None and old is not segment:
            yield f"{segment.name}.before.py", segment_text(old)
        if old is not segment:
            yield f"{segment.name}.after.py", segment_text(segment)


def _site_line(number: int, linear: Matmul) -> str:
    if linear.lossless:
        return f"#   {linear.layout} product {number}: {linear.name}"
    return f"#   4-bit product {number}: {linear.name}, groups of {linear.group_size}"
