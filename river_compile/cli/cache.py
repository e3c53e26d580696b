"""``river cache``: what processes left for the next ones, its size, and how to get rid of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.output import AsJson, megabytes, show, table

if TYPE_CHECKING:
    from rich.console import Console


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lists what earlier processes built: twins and rewritten programs, by model.

    A process that is running keeps what it has mapped.
    """
    from river_compile.compile_cache import folder

    found = [
        {"about": e.about, "folder": str(e.folder), "bytes": e.bytes, "used": e.used} for e in folder.list_entries()
    ]
    freed = folder.clear() if clear else 0
    result = {"folder": str(folder.compile_cache_folder()), "entries": found, "freed_bytes": freed}
    show("cache", result, as_json, lambda console: _page(console, result))


def _page(console: Console, result: dict[str, Any]) -> None:
    if result["freed_bytes"]:
        console.print(f"{megabytes(result['freed_bytes'])} freed in {result['folder']}")
        return
    total, now = sum(entry["bytes"] for entry in result["entries"]), time.time()
    rows = [[e["about"], megabytes(e["bytes"]), f"{(now - e['used']) / 86400:.0f}"] for e in result["entries"]]
    console.print(table(["", "size", "days unused"], rows))
    console.print(f"{megabytes(total)} in {result['folder']}")
