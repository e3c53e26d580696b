"""``river calibrate MODEL --kl 0.05 --texts FILE``: an exit rule that keeps a promise about its loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from river_compile.cli.output import AsJson, Dtype, Model, Texts, Threads, show


def calibrate(
    model: Model,
    kl: Annotated[float | None, typer.Option(help="Budget: mean KL from the plain model, nats per token.")] = None,
    agreement: Annotated[float | None, typer.Option(help="Or: least share of tokens as the plain model's.")] = None,
    texts: Texts = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the calibration as JSON.")] = None,
    criterion: Annotated[str, typer.Option(help="similarity or confidence.")] = "confidence",
    tokens: Annotated[int, typer.Option(help="Measured in each text.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each text that run as its prompt.")] = 16,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Finds the cheapest exit rule that keeps a promise on texts like yours, for `quality="calibrated"`."""
    from river_compile.calibration.calibrate import calibrate as find_rule
    from river_compile.cli.models import start
    from river_compile.cli.texts import passages

    network, tokenizer = start(model, dtype, threads)
    how: dict[str, Any] = {"criterion": criterion, "tokens": tokens, "context": context, "progress": not as_json}
    found = find_rule(network, tokenizer, passages(texts), kl=kl, agreement=agreement, **how)
    if output is not None:
        found.save(output)
    result = {
        "model": model,
        "options": found.options,
        "budget": {found.metric: found.budget},
        "confidence": found.confidence,
        "measured": dataclasses.asdict(found.chosen),
        "file": None if output is None else str(output),
    }
    show("calibrate", result, as_json, lambda console: console.print(str(found), markup=False))
