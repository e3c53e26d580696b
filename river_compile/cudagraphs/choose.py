"""Chooses whether a rewritten graph is captured, and by which device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.exits import Memories
from river_compile.fills.rivals import FILLS
from river_compile.passes.nodes import is_tensor, source_of
from river_compile.passes.program import DecoderPlan, RiverProgram, Segment
from river_compile.runtime.executor import ExitRule, RiverExecutor, Step
from river_compile.runtime.trace import ExitStats

from .device import CaptureDevice, CaptureLog
from .launch_ahead import LaunchAhead
from .runner import CapturedExecutor, Capturing


def choose_device(program: RiverProgram, config: RiverConfig, captures: CaptureLog) -> CaptureDevice | None:
    """Returns what captures a program's decode steps; None where nothing is captured, and `captures` says why."""
    if config.cudagraphs is False:
        captures.reason = "cudagraphs=False"
    elif config.fill != "river":
        captures.reason = f"fill={config.fill!r} keeps count of every token on the host"
    elif config.cudagraphs is None and _device_of(program.plan).type != "cuda":
        captures.reason = f"the model lies on {_device_of(program.plan)}; CUDA graphs need a GPU"
    else:
        captures.reason = _unsupported(program)
    return None if captures.reason else _make_device(config, program.plan)


def make_executor(
    program: RiverProgram,
    steps: Mapping[Segment, Step],
    rule: ExitRule,
    stats: ExitStats,
    memories: Memories,
    config: RiverConfig,
    captures: CaptureLog,
    device: CaptureDevice | None,
) -> RiverExecutor:
    """Returns the executor of a program: one that captures where there is a device for it."""
    if device is None:
        return RiverExecutor(program, steps, rule, stats, memories, FILLS[config.fill])
    ahead = LaunchAhead(config.launch_ahead)
    how = Capturing(device, config.max_captures, captures, ahead)
    return CapturedExecutor(program, steps, rule, stats, memories, how)


def check_device(config: RiverConfig, plan: DecoderPlan) -> None:
    """Checks that a model for which captures are asked lies on a device that has them.

    Raises:
        OptionError: it does not.
    """
    device = _device_of(plan)
    if config.cudagraphs is True and device.type != "cuda":
        raise OptionError(
            f"cudagraphs=True needs a model on a GPU, and this one lies on {device}; move it there, or leave "
            "cudagraphs out ('record' checks the schedule without a GPU)"
        )


def _device_of(plan: DecoderPlan) -> torch.device:
    return plan.device


def _make_device(config: RiverConfig, plan: DecoderPlan) -> CaptureDevice:
    if config.cudagraphs == "record":
        from .recorder import Recorder

        return Recorder()
    from .cuda import CudaGraphs

    return CudaGraphs(_device_of(plan))


def _unsupported(program: RiverProgram) -> str:
    """Returns why no unit of a graph can be captured, naming the node where there is one; empty where some can."""
    plan = program.plan
    if not plan.is_decode:
        return "a prompt's length differs from call to call; decode steps are captured"
    for block in plan.blocks:
        if block.kv.kind != "static":
            where = source_of(block.kv.writes[0])
            return f'the cache grows with every token; cache_implementation="static" keeps it in place (at {where})'
    written = {node for block in plan.blocks for node in block.kv.writes}
    for node in program.returned:
        if node in written or (node.op == "placeholder" and is_tensor(node)):
            return f"the graph returns a tensor of the caller's, which must not become a copy (at {source_of(node)})"
    return ""
