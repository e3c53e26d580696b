"""Loads gpt-oss's checkpoints with their experts as they come, in MXFP4: a quarter of the memory, the same text.

transformers dequantizes them on a CPU; here it makes each stack a parameter that holds the checkpoint's own bytes.
Not handled: GPUs, other dtypes than bfloat16, and MXFP4 in other places than stacks of experts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from river_compile.errors import OptionError
from river_compile.kernels.quant.mxfp4 import Mxfp4Stack, check_mxfp4
from river_compile.upstream.mxfp4 import loading_mxfp4_by

_DTYPES = ("auto", "bfloat16", torch.bfloat16)
_DEQUANTIZING = ("quantization_config", "device_map", "use_kernels", "tp_plan")
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def load_mxfp4(name: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a gpt-oss checkpoint on the CPU, its experts in MXFP4, in eval mode.

        model = river_compile.accelerate(river_compile.load_mxfp4("path/to/gpt-oss-20b"))

    `river_compile.from_pretrained` loads by it. The model is that of transformers, with the same values; without
    `accelerate` it runs too, slowly, since each of torch's operators reads a copy of the experts in 16 bits.

    Args:
        name: a model folder, or the name of a hub repository.
        kwargs: of ``from_pretrained`` of transformers, without those that choose a device or a quantization.

    Returns:
        The model. Parameters of stacks are ``[E, K, N]`` in bfloat16, and hold uint8 blocks and scales of ``[N, K]``.

    Raises:
        OptionError: (a ``ValueError``) another dtype, device or quantization, a checkpoint without MXFP4 experts, or
            one whose blocks or scales have wrong shapes or hold NaN.
        OSError: (of transformers) there is no such model.
    """
    wrong = why_not_mxfp4(kwargs)
    if wrong:
        raise OptionError(wrong, id="RC004")
    given = {key: kwargs[key] for key in _OF_THE_HUB if key in kwargs}
    if not is_mxfp4(kwargs.get("config") or AutoConfig.from_pretrained(name, **given)):
        raise OptionError(
            f"{name} has no experts in MXFP4 (quant_method in its config.json). Use AutoModelForCausalLM."
            "from_pretrained",
            id="RC004",
        )
    return load_as_it_comes(name, **kwargs)


def load_as_it_comes(name: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load any model by transformers, in eval mode; experts in MXFP4 stay so unless an argument forbids it."""
    with keeping_mxfp4(kwargs):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **kwargs}).eval()
    return model


def is_mxfp4(config: PretrainedConfig) -> bool:
    """Whether a checkpoint with this configuration has its experts in MXFP4."""
    found: Any = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return method == "mxfp4"


def why_not_mxfp4(kwargs: Mapping[str, Any]) -> str:
    """Return why a model loaded with these arguments of ``from_pretrained`` has no MXFP4 experts; "" if it can."""
    dtype = kwargs.get("dtype", "auto")
    if dtype not in _DTYPES:
        return f"MXFP4 experts require dtype=torch.bfloat16, not {dtype!r}. Remove dtype="
    for key in _DEQUANTIZING:
        if kwargs.get(key) is not None:
            return (
                f"load_mxfp4 loads to the CPU, as the checkpoint is quantized, so {key}= has no place. Remove it, or "
                "load by AutoModelForCausalLM.from_pretrained, which dequantizes"
            )
    return ""


def keeping_mxfp4(kwargs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Have ``from_pretrained`` with these arguments keep MXFP4 experts as they are, if they allow it."""
    return contextlib.nullcontext() if why_not_mxfp4(kwargs) else _experts_as_they_come()


@contextlib.contextmanager
def _experts_as_they_come() -> Iterator[None]:
    failed: list[OptionError] = []

    def stack_of(name: str, blocks: torch.Tensor | None, scales: torch.Tensor | None) -> torch.nn.Parameter:
        try:
            return _stack_of(name, blocks, scales)
        except ValueError as error:
            why = f"Cannot load the checkpoint: {error}. Download its files again"
            failed.append(OptionError(why, id="RC004"))
            raise

    try:
        with loading_mxfp4_by(stack_of):
            yield
    except RuntimeError:  # transformers names all parameters that it could not load
        if failed:
            raise failed[0] from None
        raise


def _stack_of(name: str, blocks: torch.Tensor | None, scales: torch.Tensor | None) -> torch.nn.Parameter:
    """Return a stack's parameter; raise a ValueError for damage."""
    if blocks is None or scales is None:
        raise ValueError(f"{name} has no {'scales' if scales is None else 'blocks'}")
    check_mxfp4(name, blocks, scales)
    return torch.nn.Parameter(Mxfp4Stack(blocks, scales), requires_grad=False)
