"""Counts how much of the project a reader meets, with targets: ``python -m tools.house``.

``--json`` prints one document. ``--sources`` leaves out the walk through a tiny model, which takes a minute.
The exit status is 0 whether targets are met or not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.house import sources as read_sources
from tools.house.sources import ROOT, circle, import_graph, parts_graph


@dataclass(frozen=True)
class Count:
    """One number, the most that it should be, and what was counted."""

    name: str
    value: float
    target: float
    counted: Sequence[str] = ()

    @property
    def is_met(self) -> bool:
        return self.value <= self.target


def count_sources(root: Path = ROOT) -> list[Count]:
    """Count what the sources below a folder show."""
    found = read_sources.read(root)
    graph = import_graph(found)
    circles = [text for text in (circle(graph), circle(parts_graph(graph))) if text]
    imports = sorted(graph.get("river_compile.backend", ()))
    hidden = read_sources.singletons(found)
    folders = read_sources.lines_by_folder(found)
    return [
        Count("product lines of Python", sum(folders.values()), 18_300, _pairs(folders)),
        Count("product lines of C++", read_sources.native_lines(root), 4_150),
        _longest("files over 420 lines", read_sources.long_files(found)),
        _longest("functions over 70 lines", read_sources.long_functions(found)),
        Count("circles of imports (files, folders)", len(circles), 0, circles),
        Count("modules that river_compile/backend.py imports", len(imports), 20, imports),
        Count("hidden singletons", len(hidden), 0, hidden),
    ]


def count_walks() -> list[Count]:
    """Count what a build, a warm exact generation and one weight go through."""
    from tools.house.walk import walk

    found = walk()
    most = [f"{calls / found.tokens:.1f} {name}" for name, calls in found.warm.functions.most_common(15)]
    return [
        Count("files that a build goes through", len(found.build.files), 48, [*found.build.files]),
        Count("files of a warm exact generate", len(found.warm.files), 14, [*found.warm.files]),
        Count("own calls a token of it", round(found.warm.calls / found.tokens, 1), 60, most),
        Count("own frames of it", found.warm.frames, 8),
        Count("files that a weight goes through", len(found.weight_files), 12, found.weight_files),
        Count("types that a weight goes through", len(found.weight_types), 6, found.weight_types),
    ]


def _longest(name: str, found: dict[str, int]) -> Count:
    return Count(name, len(found), 0, _pairs(dict(sorted(found.items(), key=lambda pair: -pair[1]))))


def _pairs(counted: dict[str, int]) -> list[str]:
    return [f"{number} {name}" for name, number in counted.items()]


def page(counts: Sequence[Count]) -> Iterator[str]:
    """Yield the lines of a table, then the names behind each number."""
    for count in counts:
        mark = "" if count.is_met else "  over"
        yield f"{count.name:<48} {count.value:>9,g}  (target {count.target:,g}){mark}"
    for count in counts:
        if count.counted:
            yield f"\n{count.name}:"
            yield from (f"  {text}" for text in count.counted)


def document(counts: Sequence[Count]) -> dict[str, Any]:
    """Return the same for --json."""
    return {"counts": [{**asdict(count), "met": count.is_met} for count in counts]}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Counts how much of the project a reader meets, beside targets.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--sources", action="store_true", help="only what the sources show; runs no model")
    parsed = parser.parse_args(arguments)
    counts = count_sources(root) + ([] if parsed.sources else count_walks())
    print(json.dumps(document(counts), indent=2) if parsed.json else "\n".join(page(counts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
