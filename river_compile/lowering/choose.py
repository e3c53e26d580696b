"""Chooses how twins are lowered: to the C++ kernels of a CPU, to generated Triton kernels, or to plain torch.

lowering     on a CPU                                           on a GPU (CUDA, or ROCm, which torch calls cuda too)
"auto"       as "native"                                        as "triton"
"inductor"   4-bit products in plain torch, slow; the rest      the generated 4-bit product, the rest through Inductor
             through Inductor
"native"     the C++ kernels, the rest through Inductor         refused
"triton"     the generated kernels in Triton's interpreter      the generated kernels, the rest through Inductor
"eager"      as "inductor", operator by operator                as "inductor", operator by operator

The backbone goes through Inductor in all but the last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.kernels.native import load as native
from river_compile.kernels.native.build import CannotBuild, has_prebuilt, working_compiler
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT, PLAIN_LAYOUT
from river_compile.passes.program import Refusal

TRITON_LAYOUT = "triton"


@dataclass(frozen=True)
class Lowering:
    """How the segments of one graph are lowered.

    `compiler` is "inductor", or "eager" to call graphs operator by operator; `layout` is that of the 4-bit weights;
    `fuse` says whether the generated kernels take the place of what they compute.
    """

    compiler: str
    layout: str
    fuse: bool

    @property
    def native(self) -> bool:
        """Whether the kernels are those in C++."""
        return self.layout == NATIVE_LAYOUT

    @property
    def dense_layout(self) -> str:
        """The layout of `river::linear` with weights in 16 bits."""
        return "dense" if self.native else TRITON_LAYOUT


def choose_lowering(config: RiverConfig, device: torch.device, flex: bool = False) -> Lowering:
    """Returns the lowering of a graph whose hidden state lies on a device.

    Args:
        config: the options.
        device: where it lies.
        flex: it calls flex attention.

    Raises:
        CannotBuild: it is that of the C++ kernels, and nothing compiles them.
        OptionError: the device, or this installation, does not have it.
    """
    compiler = "eager" if config.lowering == "eager" else "inductor"
    if flex and device.type == "cpu" and compiler != "eager":
        warn_once(
            "attn_implementation='flex_attention' has no code in Inductor for every case on a CPU, so this model runs "
            "operator by operator; load it with attn_implementation='sdpa', which the kernels of a CPU compute"
        )
        return Lowering("eager", PLAIN_LAYOUT, fuse=False)
    on_gpu = device.type == "cuda"
    if config.quantizer == "none":  # no 4-bit product, hence no layout and nothing to fuse
        return Lowering(compiler, PLAIN_LAYOUT, fuse=False)
    if device.type not in ("cpu", "cuda"):
        raise OptionError(
            f"there are no 4-bit kernels for a model on {device}; move it to a CPU or a GPU, or use quantizer='none'"
        )
    if config.lowering == "native" and on_gpu:
        raise OptionError("lowering='native' has no kernel for a model on a GPU; use lowering='auto'")
    if config.lowering == "native" or (config.lowering == "auto" and not on_gpu):
        native.load()
        return Lowering("inductor", NATIVE_LAYOUT, fuse=True)
    if config.lowering != "triton" and not on_gpu:
        return Lowering(compiler, PLAIN_LAYOUT, fuse=False)
    if importlib.util.find_spec("triton") is None:
        raise OptionError(
            f"lowering={config.lowering!r} needs Triton here, which is not installed; pip install triton, or use a "
            "model on a CPU with lowering='auto'"
        )
    return Lowering(compiler, TRITON_LAYOUT, fuse=config.lowering in ("auto", "triton"))


def begin_kernels(config: RiverConfig, device: torch.device) -> None:
    """Has kernels that are not there yet compile from now on, while a model is traced."""
    if device.type == "cpu" and config.lowering in ("auto", "native") and config.quantizer != "none":
        with contextlib.suppress(CannotBuild):  # (whoever lowers a graph raises it)
            native.begin()


def no_compiler(config: RiverConfig, example_inputs: Sequence[Any], rewritten: bool) -> Refusal | None:
    """Returns why a graph cannot be compiled for a CPU, None if it can or need not.

    A rewritten one needs no compiler where the wheel brought the C++ kernels: what they do not compute runs operator by
    operator then.
    """
    if config.lowering == "eager" or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in example_inputs):
        return None
    if rewritten and has_prebuilt() and config.lowering in ("auto", "native") and config.quantizer != "none":
        return None
    try:
        working_compiler()
    except CannotBuild as error:
        return Refusal(str(error))
    return None


def warn_of_slow_lowering(lowering: Lowering, device: torch.device) -> None:
    """Warns once if the chosen lowering is slow on this machine."""
    if lowering.layout == PLAIN_LAYOUT and lowering.compiler == "inductor":
        warn_once(
            "lowering='inductor' on a CPU multiplies by 4-bit weights in plain torch, which is right and slow; use "
            "lowering='auto' for anything but a test"
        )
    elif lowering.layout == TRITON_LAYOUT and device.type == "cpu":
        warn_once(
            "lowering='triton' on a CPU runs the generated kernels in Triton's interpreter: the answers are a GPU's, "
            "up to rounding, and take thousands of times longer; use lowering='auto' for anything but a test"
        )


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RiverWarning, stacklevel=4)
