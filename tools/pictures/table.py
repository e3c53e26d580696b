"""Which code and which records draw each picture of ``docs/images``, and the digest of both when it was drawn.

Not handled: pictures of programs that have left the repository (`ARCHIVED`), and that two versions of matplotlib
draw the same bytes: a picture is stale when its sources have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.pictures import measured, method

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "images"
_DIGESTS = FOLDER / "sources.json"


class Picture(NamedTuple):
    """A picture that can be drawn again from what is in the repository."""

    draw: Callable[[Path], object]
    sources: tuple[str, ...]  # files, relative to the repository's root


def _svg(text: Callable[[], str]) -> Callable[[Path], object]:
    return lambda path: path.write_text(text(), encoding="utf-8")


_DRAWING = ("tools/pictures/method.py", "tools/pictures/svg.py")
_MEASURED = ("tools/pictures/measured.py", "examples/plots.py")
PICTURES = {
    "how_it_works.svg": Picture(_svg(method.how_it_works), _DRAWING),
    "weight_line.svg": Picture(_svg(method.weight_line), _DRAWING),
    "criteria.png": Picture(measured.criteria, (*_MEASURED, "tools/pictures/data/criteria.json")),
    "calibration.png": Picture(measured.rule, (*_MEASURED, "tools/pictures/data/rule.json")),
    "exact_cycles.png": Picture(measured.cycles, (*_MEASURED, "tools/pictures/data/cycles.json")),
}

# Drawn by programs that need hours or a model, or that have left the repository; each by its command, and the commit.
_QUALITY = "research code of commit 7bd9e69; docs/notes/2026-11-quality.md"
ARCHIVED = {
    "demo.svg": "python -m examples.demo",
    "explain.png": "river explain MODEL -o docs/assets/explain-smollm2.html; the page in Chromium, 900 x 620 pixels",
    "quality_entries.png": _QUALITY,
    "quality_fills.png": _QUALITY,
    "quality_frontier.png": _QUALITY,
    "quality_similarity.png": _QUALITY,
    "scores.png": "python -m benchmarks.scores --picture FILE, with the models of benchmarks/results/scores.jsonl",
}


def digest(name: str) -> str:
    """Return the digest of a picture's sources."""
    found = hashlib.sha256()
    for source in PICTURES[name].sources:
        found.update((ROOT / source).read_bytes())
    return found.hexdigest()[:16]


def drawn() -> dict[str, str]:
    """Return the digests of the sources that the pictures in the repository were drawn from."""
    return json.loads(_DIGESTS.read_text(encoding="utf-8")) if _DIGESTS.exists() else {}


def write_digests(digests: dict[str, str]) -> None:
    """Keep the digests of pictures that were drawn."""
    kept = {name: digests[name] for name in sorted(digests) if name in PICTURES}
    _DIGESTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def stale() -> list[str]:
    """Return the pictures whose sources have changed since they were drawn, and those that are not there."""
    digests = drawn()
    return [name for name in PICTURES if digests.get(name) != digest(name) or not (FOLDER / name).exists()]
