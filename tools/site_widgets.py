"""MkDocs' hook for parts of pages that a reader changes: a calculator, a threshold's slider, a filter of tables.

A page asks for one by ``<!-- widget: NAME -->``, which GitHub hides. The site gets an element with its data, and
``docs/assets/site.js`` fills it. Without scripts an element stays empty, so each stands next to a table or a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mkdocs.structure.pages import Page

from river_compile.reporting import predict
from tools import machines, records
from tools.pictures import DATA

_MARK = re.compile(r"<!-- widget: (\w+) -->")
_MODES = {
    predict.PLAIN: "transformers",
    predict.EXACT: "exact (default)",
    predict.FAST: 'quality="fast", threshold=0.7',
}


def calculator() -> dict[str, Any]:
    """Return bytes per token by mode, memory and disk of each recorded shape, and the modes with their efficiency."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in records.read(records.RESULTS / "reads.jsonl"):
        runs.setdefault(record["date"], []).append(record)
    sizes = machines.sizes_of(runs[max(runs)])
    shapes = {}
    for name, size in sizes.items():
        reads = predict.bytes_per_token(size)
        shapes[name] = {
            "bytes": {mode: round(reads[mode]) for mode in _MODES},
            "memory": round(predict.memory_bytes(size)),
            "plain_memory": 2 * size.parameters,
            "disk": round(predict.disk_bytes(size)),
        }
    modes = {mode: {"title": title, "efficiency": predict.EFFICIENCY[mode]} for mode, title in _MODES.items()}
    return {"shapes": shapes, "modes": modes}


def slider() -> dict[str, Any]:
    """Return an answer's tokens, and their depth and KL at each threshold."""
    found = json.loads((DATA / "thresholds.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("question", "texts", "layers", "states")}


def filter() -> dict[str, Any]:
    """Return nothing: the filter is for all tables of its page."""
    return {}


WIDGETS: dict[str, Callable[[], dict[str, Any]]] = {"calculator": calculator, "slider": slider, "filter": filter}


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Replace the marks of a page."""
    return with_widgets(markdown)


def with_widgets(markdown: str) -> str:
    """Return a page with an element for each mark; raise KeyError for a name that is no widget."""
    return _MARK.sub(lambda found: _element(found[1]), markdown)


def _element(name: str) -> str:
    data = json.dumps(WIDGETS[name](), ensure_ascii=False).replace("</", "<\\/")
    return f'<div class="river-{name}"><script type="application/json">{data}</script></div>'
