"""The ways of running a model that commands compare, and how each is set up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN, INDUCTOR, NEVER, RIVER, CALIBRATED, EXACT, STRICT, FAST = WAYS = (
    "plain",  # the model as it is
    "inductor",  # torch.compile with Inductor
    "never",  # the kernels, and no token leaves: the plain text, up to rounding
    "river",  # every token through all twins (depth 0): the fastest, and another text
    "calibrated",  # tokens leave by a calibrated rule
    "exact",  # the plain text, drafted by the river
    "strict",  # exact, or an error if the bits may differ
    "fast",  # tokens leave by the default rule: another text
)
Rows = Annotated[list[str] | None, typer.Option("--row", help="Only this way of running; may be repeated.")]
Calibrated = Annotated[Path | None, typer.Option(help="A file of `river calibrate`, for its row.")]


def chosen(
    rows: Sequence[str] | None, of: Sequence[str], calibration: Path | None, if_asked: Sequence[str] = ()
) -> list[str]:
    """Returns the ways that `--row` asked for, in the order of `of`; without it all, calibrated if it has a file.

    Args:
        rows: what was asked for.
        of: the command's ways.
        calibration: the file.
        if_asked: those of the ways that run only where somebody asks for them.

    Raises:
        ValueError: a row that is none of them, or "calibrated" without a calibration.
    """
    for row in rows or ():
        if row not in of:
            raise ValueError(f"--row {row} is not known here; use one of {', '.join(of)}")
    if CALIBRATED in (rows or ()) and calibration is None:
        raise ValueError("--row calibrated needs --calibration FILE, which `river calibrate` writes")
    default = [row for row in of if row not in if_asked and (row != CALIBRATED or calibration)]
    return [row for row in of if row in rows] if rows else default


@contextlib.contextmanager
def running(model: PreTrainedModel, way: str, calibration: Path | None = None, **options: Any) -> Iterator[None]:
    """Inside, a plain model runs in one of `WAYS`, with options of the backend; afterwards it is plain again."""
    from river_compile.api.accelerate import accelerate, restore
    from river_compile.exits import forced_depth

    if way == INDUCTOR:
        model.compile()
    elif way != PLAIN:
        if way == NEVER:
            options["exit_depth"] = model.config.get_text_config().num_hidden_layers
        quality = FAST if way in (NEVER, RIVER) else way
        accelerate(model, quality, calibration if way == CALIBRATED else None, **options)
    try:
        with forced_depth(0) if way == RIVER else contextlib.nullcontext():
            yield
    finally:
        restore(model)
        model._compiled_call_impl = None
