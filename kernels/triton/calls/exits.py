"""Exit checks: from tensors to the launch that adds a residual, scores it, and may decide.

`ops` registers these functions as operators as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.kernels.triton import launch
from river_compile.kernels.triton.exit_score import ExitScoreSpec
from river_compile.kernels.triton.loader import dtype_name


def residual_score(update: Tensor, residual: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a residual and measures the exit score, in one launch (on the CPU: in Triton's interpreter).

    Args:
        update, residual, previous: ``[..., D]`` of one shape and dtype.

    Returns:
        hidden = residual + update ``[..., D]``, and its smallest similarity to `previous` over all rows, float32
        ``[]``, NaN where a row has none.

    Raises:
        ValueError: tensors of different shapes or dtypes.
    """
    return _exit_score(update, residual, previous)


def residual_verdict(
    update: Tensor,
    residual: Tensor,
    previous: Tensor,
    rule: Tensor,
    verdict: Tensor,
) -> tuple[Tensor, Tensor]:
    """Does what `residual_score` does, decides whether the score leaves, and notes that, in one launch.

    Args:
        update, residual, previous: as of `residual_score`.
        rule: float64 ``[1]``, the bar; see :mod:`.exit_score`.
        verdict: float32 ``[4]``, the score and in bytes 4 and 5 the booleans "leaves" and "stays". Mutated.

    Returns:
        As `residual_score`.

    Raises:
        ValueError: tensors of different shapes, or of other shapes or dtypes than these.
    """
    return _exit_score(update, residual, previous, rule, verdict)


def _exit_score(
    update: Tensor,
    residual: Tensor,
    previous: Tensor,
    rule: Tensor | None = None,
    verdict: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    inputs = {"update": update, "residual": residual, "previous": previous}
    given = {name: tensor.reshape(-1, update.shape[-1]).contiguous() for name, tensor in inputs.items()}
    hidden = torch.empty_like(given["update"])
    score = update.new_empty(1, dtype=torch.float32)
    given |= {"hidden": hidden, "score": score, **launch.present(rule=rule, verdict=verdict)}
    rows, features = hidden.shape

    def describe() -> ExitScoreSpec:
        return ExitScoreSpec(rows, features, dtype_name(update), decides=rule is not None)

    launch.chosen(("exit_score",), given, 1, describe)(given)
    return hidden.view(update.shape), score.view(())
