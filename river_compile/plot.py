"""Pictures of a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .stats import Trace

_PER_LINE = 32


def plot_depths(trace: Trace, path: str | Path, texts: list[str] | None = None) -> Path:
    """Draws a bar with the exit depth of every decode step above the token's text; see :meth:`Trace.plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    tokens = trace.tokens
    if not tokens:
        raise ValueError("nothing to draw: the trace holds no decode step (generate inside `with trace() as t:`)")
    if texts is None:
        texts = [str(i + 1) for i in range(len(tokens))]
    if len(texts) != len(tokens):
        raise ValueError(f"texts has {len(texts)} entries for {len(tokens)} decode steps; give one for each")
    rows = range(0, len(tokens), _PER_LINE)
    figure = Figure(figsize=(14, 0.9 + 1.15 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = ScalarMappable(Normalize(0, max(trace.num_blocks, 1)), "viridis_r")
    figure.suptitle(f"Exit depth of {len(tokens)} tokens, mean {trace.mean_depth:.2f} of {trace.num_blocks} blocks")
    for axes, start in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        line = tokens[start : start + _PER_LINE]
        depths = [t.depth for t in line]
        axes.bar(range(len(line)), depths, color=[colours.to_rgba(d) for d in depths], width=0.9)
        for x, depth in enumerate(depths):
            axes.text(x, depth, str(depth), ha="center", va="bottom", fontsize=7)
        axes.set_xlim(-0.6, _PER_LINE - 0.4)
        axes.set_ylim(0, max(trace.num_blocks, 1) * 1.15)
        axes.set_yticks([0, trace.num_blocks])
        labels = [_label(text) for text in texts[start : start + _PER_LINE]]
        axes.set_xticks(range(len(line)), labels, fontsize=7, rotation=35, ha="right", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    figure.savefig(path, format="png", dpi=110)
    return path


def _label(text: str) -> str:
    shown = text.replace("\n", "⏎").strip(" ") or "␣"
    return shown if len(shown) <= 12 else shown[:11] + "…"
