"""Exit checks: from tensors to the launch that adds a residual and scores it.

`ops` registers the function as an operator as it is.
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
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    inputs = {"update": update, "residual": residual, "previous": previous}
    given = {name: tensor.reshape(-1, update.shape[-1]).contiguous() for name, tensor in inputs.items()}
    hidden = torch.empty_like(given["update"])
    score = update.new_empty(1, dtype=torch.float32)
    given |= {"hidden": hidden, "score": score}
    rows, features = hidden.shape

    def describe() -> ExitScoreSpec:
        return ExitScoreSpec(rows, features, dtype_name(update))

    launch.chosen(("exit_score",), given, 1, describe)(given)
    return hidden.view(update.shape), score.view(())
