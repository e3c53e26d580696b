"""Chooses how twins are lowered: for ATen's int4 kernel, to the C++ kernels of a CPU, or to generated Triton kernels.

lowering     on a CPU                                           on a GPU (CUDA, or ROCm, which torch calls cuda too)
"auto"       as "native" where that is fast, else "inductor"    as "triton"
"inductor"   ATen's int4 product, the rest through Inductor     the generated 4-bit product, the rest through Inductor
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
from river_compile.kernels.native.build import CannotBuild, working_compiler
from river_compile.kernels.native.isa import chosen
from river_compile.kernels.native.libraries import all_ready_made
from river_compile.kernels.quant.aten_int4 import LAYOUT as ATEN_LAYOUT
from river_compile.kernels.quant.aten_int4 import has_fast_kernel
from river_compile.kernels.quant.layouts import LAYOUTS, NATIVE_LAYOUT
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


def choose_lowering(config: RiverConfig, device: torch.device, flex: bool = False, wait: bool = True) -> Lowering:
    """Returns the lowering of a graph whose hidden state lies on a device.

    Args:
        config: the options.
        device: where it lies.
        flex: it calls flex attention.
        wait: for the C++ kernels; else they only begin to compile, and may turn out not to.

    Raises:
        OptionError: the device, or this installation, does not have it.
    """
    compiler = "eager" if config.lowering == "eager" else "inductor"
    if flex and device.type == "cpu" and compiler != "eager":
        warn_once(
            "attn_implementation='flex_attention' has no code in Inductor for every case on a CPU, so this model runs "
            "operator by operator; load it with attn_implementation='sdpa', which the kernels of a CPU compute"
        )
        return Lowering("eager", ATEN_LAYOUT, fuse=False)
    on_gpu = device.type == "cuda"
    if config.quantizer == "none":  # no 4-bit product, hence no layout and nothing to fuse
        return Lowering(compiler, ATEN_LAYOUT, False)
    if device.type not in ("cpu", "cuda"):
        raise OptionError(
            f"there are no 4-bit kernels for a model on {device}; move it to a CPU or a GPU, or use quantizer='none'"
        )
    if config.lowering == "native" or (config.lowering == "auto" and _native_pays(config, on_gpu)):
        return _native(config, on_gpu, wait)
    fuse = config.lowering == "triton" or (config.lowering == "auto" and on_gpu)
    if not (fuse or on_gpu):
        return Lowering(compiler, ATEN_LAYOUT, fuse=False)
    sizes = LAYOUTS[TRITON_LAYOUT].group_sizes
    if config.group_size not in sizes:
        raise OptionError(
            f"group_size={config.group_size} has no generated kernel; use one of {', '.join(map(str, sizes))}, or "
            "lowering='inductor' on a CPU"
        )
    if importlib.util.find_spec("triton") is None:
        raise OptionError(
            f"lowering={config.lowering!r} needs Triton here, which is not installed; pip install triton, or use a "
            "model on a CPU with lowering='inductor'"
        )
    return Lowering(compiler, TRITON_LAYOUT, fuse)


def no_compiler(config: RiverConfig, example_inputs: Sequence[Any], rewritten: bool) -> Refusal | None:
    """Returns why a graph cannot be compiled for a CPU, None if it can or need not.

    A rewritten one needs no compiler where the wheel brought the C++ kernels: what they do not compute runs operator by
    operator then.
    """
    if config.lowering == "eager" or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in example_inputs):
        return None
    if rewritten and all_ready_made() and config.lowering in ("auto", "native") and _native_pays(config, on_gpu=False):
        return None
    try:
        working_compiler()
    except CannotBuild as error:
        return Refusal(str(error))
    return None


def _native_pays(config: RiverConfig, on_gpu: bool) -> bool:
    """Returns whether the C++ kernels are the fastest here: they know the processor's vectors."""
    return not on_gpu and config.group_size in LAYOUTS[NATIVE_LAYOUT].group_sizes and chosen().name != "portable"


def _native(config: RiverConfig, on_gpu: bool, wait: bool) -> Lowering:
    sizes = LAYOUTS[NATIVE_LAYOUT].group_sizes
    if on_gpu or config.group_size not in sizes:
        wrong = "the model is on a GPU" if on_gpu else f"group_size={config.group_size} is none of {sizes}"
        raise OptionError(f"lowering='native' has no kernel here: {wrong}; use lowering='auto'")
    try:
        native.load() if wait else native.begin()
    except CannotBuild as error:
        with contextlib.suppress(CannotBuild):  # (where nothing compiles, the backend says so, and rewrites nothing)
            working_compiler()
            warn_once(f"twins are C++ that is compiled here, and it cannot be, so their products are ATen's: {error}")
        return Lowering("inductor", ATEN_LAYOUT, fuse=False)
    return Lowering("inductor", NATIVE_LAYOUT, fuse=True)


def warn_of_slow_lowering(lowering: Lowering, device: torch.device) -> None:
    """Warns once if the chosen lowering is slow on this machine."""
    if lowering.layout == ATEN_LAYOUT and not has_fast_kernel():
        capability = torch.backends.cpu.get_cpu_capability()
        warn_once(f"this processor ({capability}) has no fast int4 kernel in ATen: River's answers are right, but slow")
    elif lowering.layout == TRITON_LAYOUT and device.type == "cpu":
        warn_once(
            "lowering='triton' on a CPU runs the generated kernels in Triton's interpreter: the answers are a GPU's, "
            "up to rounding, and take thousands of times longer; use lowering='auto' for anything but a test"
        )


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RiverWarning, stacklevel=4)
