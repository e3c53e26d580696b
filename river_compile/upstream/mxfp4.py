"""How transformers loads MXFP4 checkpoints: its quantizer, with another conversion of each stack of experts.

Not handled: releases without `quantizers.quantizer_mxfp4`, which load no gpt-oss.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor, nn
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

MakeStack = Callable[[str, Tensor | None, Tensor | None], nn.Parameter]  # of a name, blocks, scales


@contextlib.contextmanager
def loading_mxfp4_by(make: MakeStack) -> Iterator[None]:
    """Have models that are loaded meanwhile, in any thread, take their MXFP4 stacks from a function."""

    def convert(
        _self: Mxfp4Dequantize, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any
    ) -> dict[str, nn.Parameter]:
        own = full_layer_name.rpartition(".")[2]
        blocks, scales = (_only(input_dict.get(f"{own}_{part}")) for part in ("blocks", "scales"))
        return {full_layer_name: make(full_layer_name, blocks, scales)}

    def check(quantizer: Mxfp4HfQuantizer, *_: Any, **__: Any) -> None:
        quantizer.quantization_config.dequantize = True  # by the conversion, and without the package `kernels`
        # Threads that read ahead would hold much of this checkpoint twice; others have them.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

    with (
        mock.patch.dict(os.environ),  # restores it
        mock.patch.object(Mxfp4Dequantize, "convert", convert),
        mock.patch.object(Mxfp4HfQuantizer, "validate_environment", check),
    ):
        yield


def _only(tensor: Tensor | list[Tensor] | None) -> Tensor | None:
    return tensor[0] if isinstance(tensor, list) else tensor
