"""Chooses what captures a program's steps.

Not handled: whether a single unit can be captured, which the units and the device say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.capture.cpu_tape import Tapes
from river_compile.capture.cuda import CudaGraphs
from river_compile.capture.device import CaptureDevice, CaptureLog, stand_in
from river_compile.config import RiverConfig
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.distributed.support import NOT_CAPTURED
from river_compile.errors import OptionError
from river_compile.kernels.native.build import CannotBuild
from river_compile.lowering.choose import choose_lowering
from river_compile.passes.nodes import is_tensor, mutated_inputs, source_of, value_of
from river_compile.passes.program import RiverProgram


def captures_expected(config: RiverConfig, device: torch.device, ranks: Ranks = ALONE) -> bool:
    """Whether steps on a static cache will be captured, as far as is known before a graph is traced.

    Kernels that are not there yet compile from now on, while the graph is traced.
    """
    if ranks.several or config.cudagraphs is False:
        return False
    if device.type == "cuda" or stand_in(config.cudagraphs, device) is not None:
        return True
    try:
        return choose_lowering(config, device, wait=False).native
    except (OptionError, CannotBuild):  # (whoever lowers a graph raises it)
        return False


def choose_device(
    program: RiverProgram, config: RiverConfig, captures: CaptureLog, native: bool = False, ranks: Ranks = ALONE
) -> CaptureDevice | None:
    """Returns the device that captures a program's passes of a few tokens; None if none does, and `captures` says why.

    No pass needs to have run. `native` says whether twins become C++ calls, which a CPU captures; `ranks` are those
    that share the model.

    Raises:
        OptionError: captures are asked for, and the model does not lie on a device that has them.
    """
    device = program.plan.device
    plugged_in = stand_in(config.cudagraphs, device)
    if config.cudagraphs is True and device.type != "cuda" and not native and plugged_in is None:
        raise OptionError(
            f"cudagraphs=True needs a model on a GPU or lowering='native', and this one lies on {device}; move it "
            "there, or leave cudagraphs out"
        )
    if ranks.several:
        captures.not_captured = NOT_CAPTURED
    elif config.cudagraphs is False:
        captures.not_captured = "cudagraphs=False"
    elif config.cudagraphs is None and device.type != "cuda" and not native:
        captures.not_captured = f"the model lies on {device}; CUDA graphs need a GPU, tapes lowering='native'"
    else:
        captures.not_captured = _unsupported(program)
    if captures.not_captured:
        return None
    return plugged_in or (CudaGraphs(device) if device.type == "cuda" else Tapes())


def _unsupported(program: RiverProgram) -> str | None:
    """Returns why no unit of a graph can be captured, with the node if there is one; None if some can."""
    plan = program.plan
    for block in plan.blocks:
        if block.kv.kind != "static":
            where = source_of(block.kv.writes[0])
            return f'the cache grows with every token; cache_implementation="static" keeps it in place (at {where})'
    for block in plan.blocks:
        made = next((c for w in block.kv.writes for c in mutated_inputs(w) if c.op != "placeholder"), None)
        if made is not None:
            return f"the cache is made in this pass (at {source_of(made)})"
    for node in (n for segment in program.segments for n in segment.outputs):
        if not isinstance(value_of(node), (Tensor, int, torch.SymInt)):
            return f"a value that is neither tensor nor number goes from block to block (at {source_of(node)})"
    written = {node for block in plan.blocks for node in block.kv.writes}
    for node in program.returned:
        if node in written or (node.op == "placeholder" and is_tensor(node)):
            return f"the graph returns a tensor of the caller's, which must not become a copy (at {source_of(node)})"
    return None
