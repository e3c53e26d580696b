"""The picture of exact mode: every kept token, where it came from, and the cycle that it was kept in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from river_compile.runtime.trace import Trace

_PER_LINE = 32
_COLOURS = {"river": "#2a78b5", "lookup": "#3a9a5c", "backbone": "#d98324"}
_MEANINGS = {"river": "drafted by the river", "lookup": "copied from the context", "backbone": "the backbone's own"}


def plot_cycles(trace: Trace, path: str | Path, texts: list[str] | None = None) -> Path:
    """Draws one bar per kept token above its text, as high as its place in its cycle; see :meth:`Trace.plot`.

    A cycle climbs like a staircase. Grey outlines behind its last step are drafted tokens that did not hold.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from .plots import label

    steps = _steps(trace)
    texts = [str(i + 2) for i in range(len(steps))] if texts is None else texts
    if len(texts) != len(steps):
        raise ValueError(f"texts has {len(texts)} entries for {len(steps)} tokens kept in cycles; give one for each")
    rows = range(0, len(steps), _PER_LINE)
    figure = Figure(figsize=(14, 1.2 + 1.25 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    highest = max(height + dropped for _, height, dropped in steps)
    for axes, start in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        _draw_line(axes, steps[start : start + _PER_LINE], highest)
        names = [label(text) for text in texts[start : start + _PER_LINE]]
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=35, ha="right", parse_math=False)
    mean = len(steps) / len(trace.cycles)
    figure.suptitle(f"{len(steps)} tokens in {len(trace.cycles)} verifying passes, {mean:.2f} tokens per pass")
    handles = [Patch(color=_COLOURS[source], label=meaning) for source, meaning in _MEANINGS.items()]
    handles.append(Patch(facecolor="none", edgecolor="0.6", label="drafted, did not hold"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path = Path(path)
    figure.savefig(path, format="png", dpi=110)
    return path


def _steps(trace: Trace) -> list[tuple[str, int, int]]:
    """Returns of each kept token its source, its place in its cycle, and how many drafts were dropped behind it."""
    steps = []
    for cycle in trace.cycles:
        for place, source in enumerate(cycle.kept, start=1):
            dropped = len(cycle.drafted) - cycle.accepted if place == len(cycle.kept) else 0
            steps.append((source, place, dropped))
    return steps


def _draw_line(axes: Axes, line: list[tuple[str, int, int]], highest: int) -> None:
    for x, (source, height, dropped) in enumerate(line):
        axes.bar(x, height, color=_COLOURS[source], width=0.9)
        if dropped:
            axes.bar(x, dropped, bottom=height, facecolor="none", edgecolor="0.6", linewidth=0.8, width=0.9)
        if height == 1 and x:
            axes.axvline(x - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.6, _PER_LINE - 0.4)
    axes.set_ylim(0, highest * 1.05)
    axes.set_yticks([0, highest])
    axes.spines[["top", "right"]].set_visible(False)
