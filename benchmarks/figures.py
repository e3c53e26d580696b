"""Figures without a display: rows of panels, plain axes, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase


def panels(size: tuple[float, float], count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of some inches and its panels, side by side."""
    figure, ((_, axes),) = rows(size, count, [""])
    return figure, axes


def rows(
    size: tuple[float, float], count: int, titles: Sequence[str]
) -> tuple[Figure, list[tuple[FigureBase, list[Axes]]]]:
    """Return a figure whose rows are figures of some inches with panels side by side, each with its title.

    A single row is the figure itself and has no title.
    """
    width, height = size
    figure = Figure(figsize=(width, height * len(titles)), layout="constrained")
    FigureCanvasAgg(figure)
    parts: list[FigureBase] = [figure]
    if len(titles) > 1:
        parts = list(figure.subfigures(len(titles), 1))
        for part, title in zip(parts, titles, strict=True):
            part.suptitle(title)
    return figure, [(part, list(part.subplots(1, count, squeeze=False)[0])) for part in parts]


def plain(panel: Axes) -> None:
    """Take the frame's upper and right line away."""
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, dpi: int) -> Path:
    """Write a figure as a PNG; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=dpi)
    return path
