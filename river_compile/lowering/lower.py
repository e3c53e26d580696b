"""Chooses the kernels of a graph and lowers its segments to their operators.

Not handled: compiling the segments (`segments.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.kernels import portable
from river_compile.kernels.messages import with_id
from river_compile.kernels.native import load as native_kernels
from river_compile.kernels.native.build import CannotBuild, has_prebuilt, working_compiler
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT, PLAIN_LAYOUT, TRITON_LAYOUT
from river_compile.lowering.native import native_graph, use_native
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import drop_unused
from river_compile.passes.nodes import called
from river_compile.passes.program import Code, Lowering, Refusal, Segment
from river_compile.passes.segments import fingerprint
from river_compile.progress import stage_reached, stage_shown

_FOUND = 1.0  # seconds in which libraries that were compiled before are found


def choose_lowering(config: RiverConfig, device: torch.device, flex: bool = False) -> Lowering:
    """Return the lowering of a graph (`flex`: it calls flex attention); raise a CannotBuild or an OptionError."""
    if isinstance(config.kernels, Lowering):
        return config.kernels
    if flex and device.type == "cpu":
        warn_once(
            "RC083",
            "attn_implementation='flex_attention' is not fully supported by Inductor on a CPU, so this model runs "
            "operator by operator. Load it with attn_implementation='sdpa', which River's C++ kernels support",
        )
        return Lowering("eager", PLAIN_LAYOUT, fuse=False)
    on_gpu = device.type == "cuda"
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"River has no 4-bit kernels for a model on {device}. Move it to a CPU or a GPU", id="RC004")
    if config.kernels == "native" and on_gpu:
        raise OptionError("kernels='native' has no kernel for a model on a GPU. Use kernels='auto'", id="RC004")
    if config.kernels == "native" or (config.kernels == "auto" and not on_gpu):
        load_native()
        return Lowering("inductor", NATIVE_LAYOUT, fuse=True)
    if importlib.util.find_spec("triton") is None:
        raise OptionError(
            f"kernels={config.kernels!r} requires Triton here, which is not installed. Run pip install triton, or move "
            "the model to a CPU and use kernels='auto'",
            id="RC005",
        )
    return Lowering("inductor", TRITON_LAYOUT, fuse=True)


def load_native() -> None:
    """Load the C++ kernels; a stage is shown while they are compiled. Raise a CannotBuild."""
    if not native_kernels.built(_FOUND):
        with stage_shown("compiling the C++ kernels, once per machine"):
            while not native_kernels.built(_FOUND):
                stage_reached(0.0)
    native_kernels.load()


def load_generated() -> None:
    """Have generated kernels run the operators that they compute."""
    from river_compile.kernels.triton import operators  # noqa: F401  (registers them)


def begin_kernels(config: RiverConfig, device: torch.device) -> None:
    """Start to compile missing C++ kernels in the background, while a model is traced."""
    if device.type == "cpu" and config.kernels in ("auto", "native"):
        with contextlib.suppress(CannotBuild):  # `choose_lowering` raises it
            native_kernels.begin()


def no_compiler(config: RiverConfig, example_inputs: Sequence[Any], rewritten: bool) -> Refusal | None:
    """Return why a graph cannot be compiled for a CPU, None if it can or need not."""
    if config.runs_by_operator or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in example_inputs):
        return None
    # With the wheel's C++ kernels an optimized graph needs no compiler: other operators run one by one.
    if rewritten and has_prebuilt() and config.kernels in ("auto", "native"):
        return None
    try:
        working_compiler()
    except CannotBuild as error:
        return Refusal(str(error))
    return None


def warn_of_slow_lowering(lowering: Lowering, device: torch.device) -> None:
    if lowering.layout == TRITON_LAYOUT and device.type == "cpu":
        warn_once(
            "RC083",
            "kernels='triton' on a CPU runs the generated kernels in Triton's interpreter. Results are a GPU's up to "
            "rounding and take thousands of times longer. Use kernels='auto' except for tests",
        )


@functools.cache
def warn_once(id: str, text: str) -> None:
    warnings.warn(with_id(id, text), RiverWarning, stacklevel=4)


def lower_segment(segment: Segment, lowering: Lowering) -> Code:
    """Return a segment in the operators of a lowering; one that is only C++ operators skips Inductor."""
    mark = segment.fingerprint or fingerprint(segment)
    module = native_graph(segment) if lowering.native else None
    runs_by: Literal["native", "operators", "inductor"] = "native"
    if module is None:
        # An embedding stage has too few operators to be worth compiling, and operator by operator a token gets the
        # same bits in passes of every width.
        by_operator = lowering.compiler == "eager" or (lowering.native and segment.kind == "prologue")
        module, runs_by = lower_ops(segment.graph, lowering.native), "operators" if by_operator else "inductor"
    for node in module.graph.nodes:
        node.meta = {}
    return Code(module, runs_by, mark)


def lower_ops(traced: fx.Graph, native: bool = False) -> fx.GraphModule:
    """Return a copy of a graph that can run, with `native` by the C++ kernels."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    if native:
        use_native(graph)
    for node in graph.nodes:
        if node.target is torch.ops.river.linear.default:
            if node.args[6] == TRITON_LAYOUT and called(node.args[1], torch.cat):
                _split_weights(node)
        elif node.target is torch.ops.river.exit_score.default:  # an operator that no rule fused
            node.target = portable.smallest_cosine
    return fx.GraphModule(traced.owning_module, graph, class_name="Segment")


def _split_weights(linear: fx.Node) -> None:
    """Make a linear read its concatenated weights in place."""
    x, weight, _, bias, *_ = linear.args
    linear.target = torch.ops.river.merged.default
    linear.args = (x, parts_of(weight), parts_of(bias))
    for joined in filter(None, (weight, bias)):
        drop_unused(joined)
