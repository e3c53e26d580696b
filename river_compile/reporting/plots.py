"""Pictures of a trace and of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.exits import threshold_text

if TYPE_CHECKING:
    from river_compile.calibration.result import Calibration
    from river_compile.runtime.trace import Trace

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
    doubted = f"; {trace.doubted} doubted (hatched): river, then backbone" if trace.doubted else ""
    figure.suptitle(
        f"Exit depth of {len(tokens)} tokens, mean {trace.mean_depth:.2f} of {trace.num_blocks} blocks{doubted}"
    )
    for axes, start in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        line = tokens[start : start + _PER_LINE]
        depths = [t.depth for t in line]
        hatches = ["///" if t.doubted else "" for t in line]
        axes.bar(range(len(line)), depths, color=[colours.to_rgba(d) for d in depths], width=0.9, hatch=hatches)
        for x, depth in enumerate(depths):
            axes.text(x, depth, str(depth), ha="center", va="bottom", fontsize=7)
        axes.set_xlim(-0.6, _PER_LINE - 0.4)
        axes.set_ylim(0, max(trace.num_blocks, 1) * 1.15)
        axes.set_yticks([0, trace.num_blocks])
        labels = [label(text) for text in texts[start : start + _PER_LINE]]
        axes.set_xticks(range(len(line)), labels, fontsize=7, rotation=35, ha="right", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    figure.savefig(path, format="png", dpi=110)
    return path


def label(text: str) -> str:
    """Returns a token's text as it can stand under an axis."""
    shown = text.replace("\n", "⏎").strip(" ") or "␣"
    return shown if len(shown) <= 12 else shown[:11] + "…"


def plot_candidates(calibration: Calibration, path: str | Path) -> Path:
    """Draws every candidate's loss against its cost, with the budget; see :meth:`Calibration.plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_kl = calibration.metric == "kl"
    limit = calibration.budget if is_kl else 1 - calibration.budget
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(limit, color="tab:red", linewidth=1, label="budget")
    for label, passed, colour in (
        ("passed", True, "tab:green"),
        ("failed", False, "tab:orange"),
        ("pilot texts only", None, "lightgray"),
    ):
        shown = [c for c in calibration.candidates if c.passed is passed]
        if shown:
            axes.scatter([c.cost for c in shown], [c.loss for c in shown], c=colour, label=label, zorder=2)
    best = calibration.chosen
    axes.scatter([best.cost], [best.loss], s=160, facecolors="none", edgecolors="black", label="chosen", zorder=3)
    axes.set_title(f"threshold {threshold_text(best.threshold)}, first exit {best.first_exit}")
    axes.set_xlabel("time per token, share of never exit")
    axes.set_ylabel("KL, nats per token, clipped by text" if is_kl else "disagreement, share of tokens")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    figure.savefig(path, format="png", dpi=110)
    return path
