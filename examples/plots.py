"""Draws measurements: exits and sources of a trace's tokens, and the candidates of `tune_exit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

try:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise SystemExit(
        f'error: pictures need matplotlib ({error}); in the clone, run: pip install ".[pictures]"'
    ) from None

from river_compile import ExitRule, Trace
from river_compile.exits import threshold_text
from river_compile.runtime.stats import CycleRecord, StepRecord

_DPI = 110
PAGE_WIDTH = 900 / _DPI  # inches, of the manual
_PER_LINE = 16
_SOURCES = {  # of a token in exact mode: color and meaning
    "river": ("#2a78b5", "drafted by the twins"),
    "lookup": ("#3a9a5c", "copied from the context"),
    "backbone": ("#d98324", "chosen by the 16-bit layers"),
}
_VERDICTS = ((True, "passed", "tab:green"), (False, "failed", "tab:orange"), (None, "pilot texts only", "lightgray"))


def plot_trace(trace: Trace, path: str | Path, texts: Sequence[str] | None = None) -> Path:
    """Draw a trace's tokens above their texts as a PNG; return the path.

    Bars are exit depths. Where cycles of exact mode were recorded, they are the tokens' places in their cycles,
    colored by where the tokens came from.

    Args:
        trace: of `river_compile.trace`.
        path: the file to write.
        texts: the decoded text of each token but a prompt's first: one for each of ``trace.tokens``, in exact mode
            for each token that the cycles kept. Numbers stand in where it is None.

    Raises:
        ValueError: nothing was recorded, or `texts` has another length.
    """
    if trace.cycles:
        return _plot_cycles(path, texts, trace.cycles)
    return _plot_depths(path, texts, trace.tokens, trace.num_blocks)


def plot_calibration(found: ExitRule, path: str | Path) -> Path:
    """Draw loss against cost of all candidates, with the budget, as a PNG; return the path."""
    is_kl = found.metric == "kl"
    figure = new_figure(PAGE_WIDTH, 4.6)
    axes = figure.subplots()
    axes.axhline(found.budget if is_kl else 1 - found.budget, color="tab:red", linewidth=1, label="budget")
    for passed, label, color in _VERDICTS:
        shown = [c for c in found.candidates if c.passed is passed]
        if shown:
            axes.scatter([c.cost for c in shown], [c.loss for c in shown], c=color, label=label, zorder=2)
    best = found.chosen
    axes.scatter([best.cost], [best.loss], s=160, facecolors="none", edgecolors="black", label="chosen", zorder=3)
    what = "KL" if is_kl else "disagreement"
    rule = f"threshold {threshold_text(best.threshold)}, first exit {best.first_exit}"
    axes.set_title(f"The fastest rule within the budget of {what}: {rule}")
    axes.set_xlabel("time per token, as a share of full depth's")
    axes.set_ylabel("KL, nats per token, clipped by text" if is_kl else "disagreement, share of tokens")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches that no window will show."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG without the frames' upper and right edges; return the path."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(path), format="png", dpi=_DPI)
    return Path(path)


def _plot_depths(path: str | Path, texts: Sequence[str] | None, steps: Sequence[StepRecord], num_blocks: int) -> Path:
    """Draw each decode step's exit depth, above the text of its token."""
    if not steps:
        raise ValueError("nothing to draw: the trace holds no decode step (generate inside `with trace() as t:`)")
    names = _names(texts, len(steps), "decode steps", first=1)
    mean = sum(step.depth for step in steps) / len(steps)
    title = f"Exit depth of {len(steps)} tokens, mean {mean:.2f} of {num_blocks} layers"
    highest = max(num_blocks, 1)
    colors = colormaps["viridis_r"]
    figure = _lines_of_tokens(names, highest, room=1.15, what="exit depth")
    figure.suptitle(title)
    for i, step in enumerate(steps):
        axes, x = figure.axes[i // _PER_LINE], i % _PER_LINE
        axes.bar(x, step.depth, color=colors(step.depth / highest), width=0.9)
        axes.text(x, step.depth, str(step.depth), ha="center", va="bottom", fontsize=7)
    return save_figure(figure, path)


def _plot_cycles(path: str | Path, texts: Sequence[str] | None, cycles: Sequence[CycleRecord]) -> Path:
    """Draw each token that exact mode kept as high as its place in its cycle, colored by where it came from.

    Each cycle climbs like a staircase; grey outlines on its last step are rejected drafts.
    """
    kept = sum(len(cycle.emitted) for cycle in cycles)
    names = _names(texts, kept, "tokens kept in cycles", first=2)
    dropped = [len(cycle.drafted) - cycle.accepted for cycle in cycles]
    highest = max(len(cycle.emitted) + more for cycle, more in zip(cycles, dropped, strict=True))
    figure = _lines_of_tokens(names, highest, room=1.05, what="place")
    mean = kept / len(cycles)
    figure.suptitle(f"{kept} tokens in {len(cycles)} passes of the 16-bit layers: {mean:.2f} for each", fontsize=11)
    bars = iter(range(kept))
    for cycle, more in zip(cycles, dropped, strict=True):
        for height, source in enumerate(cycle.emitted, start=1):
            i = next(bars)
            axes, x = figure.axes[i // _PER_LINE], i % _PER_LINE
            axes.bar(x, height, color=_SOURCES[source][0], width=0.9)
            if height == 1 and x:
                axes.axvline(x - 0.5, color="0.85", linewidth=0.8, zorder=0)
        if more:
            axes.bar(x, more, bottom=height, facecolor="none", edgecolor="0.6", linewidth=0.8, width=0.9)
    handles = [Patch(color=color, label=meaning) for color, meaning in _SOURCES.values()]
    handles.append(Patch(facecolor="none", edgecolor="0.6", label="drafted, rejected"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save_figure(figure, path)


def _names(texts: Sequence[str] | None, count: int, what: str, first: int) -> list[str]:
    """Return each bar's label: its token's text, cut to a dozen characters, or its number."""
    if texts is None:
        return [str(first + i) for i in range(count)]
    if len(texts) != count:
        raise ValueError(f"texts has {len(texts)} entries for {count} {what}; give one for each")
    shown = [text.replace("\n", "⏎").strip(" ") or "␣" for text in texts]
    return [text if len(text) <= 12 else text[:11] + "…" for text in shown]


def _lines_of_tokens(names: Sequence[str], highest: int, room: float, what: str) -> Figure:
    """Return a figure with lines of 16 tokens, their names below, for bars up to `highest`."""
    lines = [names[start : start + _PER_LINE] for start in range(0, len(names), _PER_LINE)]
    figure = new_figure(PAGE_WIDTH, 0.9 + 1.25 * len(lines))
    for axes, line in zip(figure.subplots(len(lines), squeeze=False)[:, 0], lines, strict=True):
        axes.set_xticks(range(len(line)), line, fontsize=9, rotation=30, ha="right", parse_math=False)
        axes.set_xlim(-0.6, _PER_LINE - 0.4)
        axes.set_ylim(0, highest * room)
        axes.set_yticks([0, highest])
        axes.set_ylabel(what, fontsize=9)
    return figure
