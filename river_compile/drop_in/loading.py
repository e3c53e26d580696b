"""Loads a model's folder straight into an accelerated model: weights by transformers, twins from an artifact.

Both are mapped, not copied, where the model keeps its folder's dtype and the C++ kernels of a CPU multiply.

Not handled: models that are no causal language models, and quantized folders that need arguments of their own; load
those with transformers and call :func:`river_compile.accelerate`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from river_compile.calibration.result import Calibration

from .quality import accelerate


def load(
    folder: str | os.PathLike[str],
    artifact: str | os.PathLike[str] | None = None,
    quality: str = "exact",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model in eval mode and accelerates it.

    Args:
        folder: a model folder or the name of a hub repository.
        artifact: a folder written by :func:`river_compile.save` or ``river pack``; None: the twins are packed at
            the first token. With ``on_missing_artifact="save"`` a folder that is missing is written then.
        quality, calibration, options: as for :func:`river_compile.accelerate`.
        loading: arguments of ``from_pretrained``, such as ``{"dtype": "bfloat16"}``; by default the folder's dtype.

    Raises:
        OptionError: (a ``ValueError``) a bad argument.
        OSError: there is no such model (of transformers).
    """
    arguments = {"dtype": "auto", **({} if loading is None else loading)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    given = {} if artifact is None else {"artifact": os.fspath(artifact)}
    return accelerate(model, quality, calibration, **given, **options)
