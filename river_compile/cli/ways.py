"""The ways of running a model that commands compare: how each is set up, and what one generation costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN, INDUCTOR, RIVER, CALIBRATED, EXACT, STRICT, FAST = (
    "plain", "inductor", "river", "calibrated", "exact", "strict", "fast",
)  # fmt: skip
WAYS = (PLAIN, INDUCTOR, RIVER, CALIBRATED, EXACT, STRICT, FAST)
MEANING = {
    PLAIN: "the model as it is",
    INDUCTOR: "torch.compile with Inductor",
    RIVER: "every token through all twins (depth 0): the fastest, and another text",
    CALIBRATED: "tokens leave by a calibrated rule",
    EXACT: "the plain text, drafted by the river",
    STRICT: "exact, or an error where the bits may differ",
    FAST: "tokens leave by the default rule: another text",
}


Rows = Annotated[list[str] | None, typer.Option("--row", help="Only this way of running; may be repeated.")]


def chosen(rows: Sequence[str] | None, of: Sequence[str], calibration: Path | None) -> list[str]:
    """Returns the ways that `--row` asked for, in the order of `of`; without it all, calibrated where it has a file.

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
    """Inside, a model runs in one of the ways; afterwards it is plain again.

    Args:
        model: a plain model.
        way: one of `WAYS`.
        calibration: the file of a calibration, for "calibrated".
        options: of the backend.

    Raises:
        ValueError: no such way, or "calibrated" without a calibration.
    """
    from river_compile.api.accelerate import accelerate, restore
    from river_compile.exits import forced_depth

    if way not in WAYS:
        raise ValueError(f"way {way!r} is not known; use one of {', '.join(WAYS)}")
    depth: AbstractContextManager[None] = contextlib.nullcontext()
    if way == INDUCTOR:
        model.compile()
    elif way == RIVER:
        accelerate(model, FAST, **options)
        depth = forced_depth(0)
    elif way in (EXACT, STRICT):
        accelerate(model, way, **options)
    elif way != PLAIN:
        accelerate(model, way, calibration if way == CALIBRATED else None, **options)
    try:
        with depth:
            yield
    finally:
        restore(model)
        model._compiled_call_impl = None
