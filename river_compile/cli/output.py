"""Options and output that commands share: one JSON document or a page for people, and errors in one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile import __version__

if TYPE_CHECKING:
    from rich.console import Console

FAILED, NO = 1, 3

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document (docs/river.schema.json) and no more.")]
Model = Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")]
Threads = Annotated[int, typer.Option("--threads", "-t", help="Of torch; 0: its own choice.")]
Quality = Annotated[str, typer.Option(help="exact, strict, calibrated or fast.")]
Calibration = Annotated[Path | None, typer.Option(help="For calibrated: a file of `river calibrate`.")]
Twins = Annotated[Path | None, typer.Option(help="Twins of `river pack`.")]
Texts = Annotated[Path | None, typer.Option(help="Texts, separated by empty lines; without: Python's documentation.")]


def error_line(error: BaseException) -> str:
    """Returns an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def show(command: str, result: dict[str, Any], as_json: bool, page: Callable[[Console], object]) -> None:
    """Prints a command's result: as JSON, with the command and this release's version, or as a page."""
    if as_json:
        whole = {"command": command, "version": __version__, **result}
        json.dump(_sayable(whole), sys.stdout, indent=2, allow_nan=False)
        print()
        return
    from rich.console import Console

    page(Console(highlight=False))


def _sayable(value: Any) -> Any:
    """Returns a value as JSON can hold it: infinite numbers as "inf" or "-inf", NaN as None."""
    if isinstance(value, dict):
        return {key: _sayable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sayable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """Returns a table without lines: text to the left, numbers to the right with two decimals, None as a dash."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        numeric = any(isinstance(row[i], (int, float)) for row in rows)
        made.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(cell, row))
    return made


def cell(value: object) -> str:
    """Returns a table's entry."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def megabytes(size: float) -> str:
    """Returns bytes for people, in units of 10^6."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def use_threads(threads: int) -> None:
    """Sets torch's threads if a number is given."""
    import torch

    if threads < 0:
        raise ValueError(f"--threads {threads} is not allowed; give 1 or more, or 0 for torch's own choice")
    if threads:
        torch.set_num_threads(threads)
