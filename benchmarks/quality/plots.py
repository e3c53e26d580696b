"""Draws what `benchmarks.quality` measured, a row for each model: fills in parts, frontier, KV entries, exit score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from benchmarks import figures
from benchmarks.quality.fills import BUDGETS, PARTS

PART_COLORS = {"backbone": "#4c6a92", "tail": "#6fb1a0", "repair": "#d98b5f"}
FILL_COLORS = {
    "river": "#1a7f74",
    "propagate": "#b3562c",
    "recompute": "#6a4c93",
    "mask": "#8a8a8a",
    "monotone": "#c79a2b",
}
GRAY = "#666666"


def plot(outcomes: Mapping[str, dict], folder: str | Path) -> list[Path]:
    """Writes the figures of the parts that were measured, by model, as PNGs; returns their paths."""
    return [figures.save(f, Path(folder) / f"quality_{name}.png", dpi=100) for name, f in draw(outcomes).items()]


def draw(outcomes: Mapping[str, dict]) -> dict[str, Figure]:
    """Returns the figures of the parts that were measured by their names."""
    drawings: dict[str, tuple[Callable, str, tuple[float, float], int]] = {
        "fills": (_fills, "fills", (9, 3.8), 2),
        "frontier": (_frontier, "fills", (7, 4.4), 1),
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


def _fills(figure: FigureBase, axes: list[Axes], outcome: dict) -> None:
    fills = outcome["fills"]
    tallest = max(sum(f["budgets"][b]["ms"].values()) for f in fills.values() for b in BUDGETS)
    for panel, budget in zip(axes, BUDGETS, strict=True):
        for x, fill in enumerate(fills.values()):
            found, bottom = fill["budgets"][budget], 0.0
            for part in PARTS:
                label = part if x == 0 and panel is axes[0] else None
                panel.bar(x, found["ms"][part], bottom=bottom, width=0.62, color=PART_COLORS[part], label=label)
                bottom += found["ms"][part]
            panel.text(x, bottom + 0.02 * tallest, f"KL {found['kl']:.2f}", ha="center", fontsize=9, color=GRAY)
        panel.axhline(outcome["ms_never"], color=GRAY, linewidth=1, linestyle=":")
        panel.text(len(fills) - 0.6, outcome["ms_never"], "never exit", ha="right", va="bottom", fontsize=9, color=GRAY)
        panel.set_xticks(range(len(fills)), list(fills), fontsize=9)
        panel.set_ylim(0, 1.15 * max(tallest, outcome["ms_never"]))
        river = fills["river"]["budgets"][budget]
        panel.set_title(f"{budget}: {river['depth']:.0f} of {outcome['blocks']} blocks in the mean", fontsize=11)
        _plain(panel)
    axes[0].set_ylabel("ms per token")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=len(PARTS))


def _frontier(figure: FigureBase, axes: list[Axes], outcome: dict) -> None:
    (panel,) = axes
    frontier, rate = outcome["frontier"], 1e3 / outcome["ms_never"]
    for name, kls in frontier["kl"].items():
        found = [(rate / t, kl) for t, kl in zip(frontier["times"], kls, strict=True) if kl is not None]
        speeds, losses = zip(*found, (rate, 0.0), strict=True)
        color, width = FILL_COLORS[name], 2.4 if name == "river" else 1.6
        panel.plot(speeds, losses, color=color, linewidth=width, label=name)
        points = [(rate / p["time"], p["kl"]) for p in outcome["fills"][name]["points"]]
        panel.scatter(*zip(*points, strict=True), s=14, color=color)
    panel.set_yscale("symlog", linthresh=0.1)
    panel.set_yticks([0, 0.05, 0.1, 0.3, 1, 3, 10], ["0", "0.05", "0.1", "0.3", "1", "3", "10"])
    panel.set_ylim(bottom=0)
    panel.invert_yaxis()
    panel.set_xlabel("tokens/s (forward pass)")
    panel.set_ylabel("KL from never exit, nats per token (up is better)")
    panel.legend(frameon=False, fontsize=9, loc="center right")
    _plain(panel)


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
