"""Draws what `benchmarks.quality` measured, a row for each model: KV entries, exit score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from benchmarks import figures

GRAY = "#666666"


def plot(outcomes: Mapping[str, dict], folder: str | Path) -> list[Path]:
    """Write the figures of the parts that were measured, by model, as PNGs; return their paths."""
    return [figures.save(f, Path(folder) / f"quality_{name}.png", dpi=100) for name, f in draw(outcomes).items()]


def draw(outcomes: Mapping[str, dict]) -> dict[str, Figure]:
    """Return the figures of the parts that were measured by their names."""
    drawings: dict[str, tuple[Callable, str, tuple[float, float], int]] = {
        "entries": (_entries, "entries", (9, 3.6), 2),
        "similarity": (_similarity, "entries", (9, 3.6), 2),
    }
    drawn = {}
    for name, (fill, part, size, count) in drawings.items():
        if all(part in outcome for outcome in outcomes.values()):
            drawn[name], rows = figures.rows(size, count, list(outcomes))
            for (figure, axes), outcome in zip(rows, outcomes.values(), strict=True):
                fill(figure, axes, outcome)
    return drawn


def _entries(figure: FigureBase, axes: list[Axes], outcome: dict) -> None:
    entries = outcome["entries"]
    low = min(min(map(min, entries[kind])) for kind in ("keys", "values"))
    low = math.floor(low * 50) / 50
    for panel, kind in zip(axes, ("keys", "values"), strict=True):
        grid = [
            [cosine if layer >= depth else math.nan for layer, cosine in enumerate(row)]
            for depth, row in zip(entries["depths"], entries[kind], strict=True)
        ]
        image = panel.imshow(grid, aspect="auto", vmin=low, vmax=1, cmap="viridis", interpolation="nearest")
        panel.set_yticks(range(len(grid)), [str(d) for d in entries["depths"]])
        ticks = range(0, outcome["blocks"], max(1, outcome["blocks"] // 6))
        panel.set_xticks(list(ticks), [str(t + 1) for t in ticks])
        panel.set_xlabel("layer")
        panel.set_title(kind, fontsize=11)
        panel.spines[:].set_visible(False)
    axes[0].set_ylabel("blocks before the exit")
    figure.colorbar(image, ax=list(axes), label="cosine, twin and backbone", shrink=0.9)


def _similarity(figure: FigureBase, axes: list[Axes], outcome: dict) -> None:
    entries = outcome["entries"]
    similarity, correlation = entries["similarity"], entries["correlation"]
    layers = range(1, len(similarity["mean"]) + 1)
    axes[0].fill_between(layers, similarity["low"], similarity["high"], color="#6fb1a0", alpha=0.35, linewidth=0)
    axes[0].plot(layers, similarity["mean"], color="#1a7f74", linewidth=2)
    axes[0].set_title("similarity of a block's input and output", fontsize=11)
    axes[0].set_xlabel("layer (band: 80 % of the tokens)")
    axes[0].set_ylim(top=1.02)
    axes[1].axhline(0, color=GRAY, linewidth=1)
    axes[1].plot(correlation["depths"], correlation["rank"], color="#b3562c", linewidth=2, marker="o", markersize=4)
    axes[1].set_title("its rank correlation with the last layer's value error", fontsize=11)
    axes[1].set_xlabel("blocks before the exit")
    axes[1].set_ylim(-1, 1)
    for panel in axes:
        _plain(panel)


def _plain(panel: Axes) -> None:
    figures.plain(panel)
    panel.tick_params(labelsize=9)
