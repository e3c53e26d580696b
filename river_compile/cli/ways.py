"""The ways of running a model that commands compare, and how each is set up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN, INDUCTOR, RIVER, CALIBRATED, EXACT, STRICT, FAST = WAYS = (
    "plain",  # the model as it is
    "inductor",  # torch.compile with Inductor
    "river",  # every token through all twins (depth 0): the fastest, and another text
    "calibrated",  # tokens leave by a calibrated rule
    "exact",  # the plain text, drafted by the river
    "strict",  # exact, or an error if the bits may differ
    "fast",  # tokens leave by the default rule: another text
)
Rows = Annotated[list[str] | None, typer.Option("--row", help="Only this way of running; may be repeated.")]
Calibrated = Annotated[Path | None, typer.Option(help="A file of `river calibrate`, for its row.")]


def chosen(rows: Sequence[str] | None, of: Sequence[str], calibration: Path | None) -> list[str]:
    """Returns the ways that `--row` asked for, in the order of `of`; without it all, calibrated if it has a file.

    Raises:
        ValueError: a row that is none of them, or "calibrated" without a calibration.
    """
    for row in rows or ():
        if row not in of:
            raise ValueError(f"--row {row} is not known here; use one of {', '.join(of)}")
    if CALIBRATED in (rows or ()) and calibration is None:
        raise ValueError("--row calibrated needs --calibration FILE, which `river calibrate` writes")
    return [row for row in of if (row in rows if rows else row != CALIBRATED or calibration)]


@contextlib.contextmanager
def running(model: PreTrainedModel, way: str, calibration: Path | None = None, **options: Any) -> Iterator[None]:
    """Inside, a plain model runs in one of `WAYS`, with options of the backend; afterwards it is plain again."""
    from river_compile.api.accelerate import accelerate, restore
    from river_compile.exits import forced_depth

    if way == INDUCTOR:
        model.compile()
    elif way != PLAIN:
        accelerate(model, FAST if way == RIVER else way, calibration if way == CALIBRATED else None, **options)
    try:
        with forced_depth(0) if way == RIVER else contextlib.nullcontext():
            yield
    finally:
        restore(model)
        model._compiled_call_impl = None
