"""Pictures of recorded data: one answer's cycles, the candidates of an exit rule, the trade-off of exit criteria."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.plots import PAGE_WIDTH, new_figure, plot_calibration, plot_trace, save_figure
from river_compile import ExitRule, Trace
from river_compile.runtime.stats import CycleRecord
from tools.pictures import DATA

_LINES = {"similarity": "tab:blue", "confidence": "tab:green", "chance": "black", "oracle": "0.6"}


def cycles(path: Path) -> None:
    """Draw the cycles that `tools.pictures.record` recorded."""
    found = _read("cycles")
    records = [
        CycleRecord(
            tuple(cycle["drafted"]), tuple(cycle["emitted"]), cycle["width"], (0.0, 0.0, 0.0), thread=0, model=0
        )
        for cycle in found["cycles"]
    ]
    plot_trace(Trace(cycles=records), path, found["texts"])


def rule(path: Path) -> None:
    """Draw the candidates of the exit rule that `tools.pictures.record` recorded."""
    plot_calibration(ExitRule.load(DATA / "rule.json"), path)


def criteria(path: Path) -> None:
    """Draw the KL of each criterion at equal time per token, of two models."""
    found = _read("criteria")
    figure = new_figure(PAGE_WIDTH, 3.6)
    for axes, (model, lines) in zip(figure.subplots(1, len(found["kl"])), found["kl"].items(), strict=True):
        for name, values in lines.items():
            style = "--" if name == "chance" else ":" if name == "oracle" else "-"
            axes.plot(
                [*found["time"], 1], [*values, 0], style, color=_LINES[name], label=name, marker="o", markersize=4
            )
        axes.set_title(model, fontsize=11)
        axes.set_xlabel("time per token, as a share of full depth's", fontsize=9)
        axes.set_ylabel("KL from full depth, nats per token", fontsize=9)
        axes.set_ylim(bottom=0)
    figure.axes[-1].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _read(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
