"""Figures without a display: a row of panels, plain axes, and the file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def panels(size: tuple[float, float], count: int) -> tuple[Figure, list[Axes]]:
    """Returns a figure of some inches and its panels, side by side."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def plain(panel: Axes) -> None:
    """Takes the frame's upper and right line away."""
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, dpi: int) -> Path:
    """Writes a figure as a PNG; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=dpi)
    return path
