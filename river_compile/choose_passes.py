"""Which passes turn a decoder into what the options ask for, and with which kernels its matrices are multiplied.

Not handled: how segments are compiled (:mod:`river_compile.lowering`), and where their weights come from
(:mod:`river_compile.twins`).
"""

from __future__ import annotations

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.lowering.choose import Lowering
from river_compile.passes.backbone import river_backbone
from river_compile.passes.exit_checks import exit_checks, logits_entropy
from river_compile.passes.fusion.fuse import fuse_backbone, fuse_checks, fuse_twins
from river_compile.passes.heads import rescored_head, wanted_logits
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import DecoderPlan
from river_compile.passes.twins import Twinning, one_row_head, river_head, river_twins
from river_compile.runtime.fill import Fill


def passes_for(
    config: RiverConfig,
    plan: DecoderPlan,
    lowering: Lowering,
    fill: type[Fill] = Fill,
    decides: bool = False,
) -> list[Pass]:
    """Returns the passes, in order, that turn a decoder into what the options ask for.

    `fill` may put something else in the twins' place; with `decides` the kernels of exit checks decide on the device.
    """
    how = twinning(config, lowering)
    policy = config.exit_policy(plan)
    leaves, candidates = policy.may_leave(plan), policy.candidates(plan)
    passes: list[Pass] = []
    head = head_twinning(config, lowering) if leaves else None
    if leaves:
        passes += fill.passes(candidates) or [river_twins(how)]
        if head is not None:
            passes.append(river_head(head))
        elif how is not None and (plan.is_decode or not lowering.fuse):
            passes.append(one_row_head(lowering.fuse))
    own_backbone = uses_own_backbone(config, lowering, plan.is_decode)
    if own_backbone:
        passes.append(river_backbone(lowering.dense_layout))
    if candidates:
        passes.append(exit_checks(candidates))
    if policy.needs_entropy(plan):
        passes.append(logits_entropy)
    if lowering.fuse and leaves and not lowering.native:
        passes.append(fuse_checks(decides))  # (takes a block's last addition with it, so before the backbone's rules)
    if own_backbone:
        passes.append(fuse_backbone(lowering.dense_layout))
    if lowering.fuse and leaves:
        passes.append(fuse_twins(lowering.dense_layout))
    if head is not None:
        passes.append(rescored_head)
        if lowering.native and plan.is_decode:
            passes.append(wanted_logits)
    return passes


def twinning(config: RiverConfig, lowering: Lowering) -> Twinning | None:
    """Returns how twins are made, None where they keep the backbone's weights."""
    if config.quantizer == "none":
        return None
    return Twinning(config.group_size, lowering.layout, scale_inputs=config.quantizer == "awq")


def uses_own_backbone(config: RiverConfig, lowering: Lowering, is_decode: bool) -> bool:
    """Says whether the backbone's blocks multiply by the kernels' own products.

    Those of a CPU do by default; the generated ones, whose sums are in another order than the model's, where it is
    asked for, and in decode steps alone: wider passes are a library's.

    Raises:
        OptionError: they are asked for, and there are none.
    """
    if config.backbone == "river" and not lowering.fuse:
        raise OptionError(
            f"backbone='river' needs the kernels in C++ or the generated ones, and the lowering is {lowering.compiler} "
            f"with layout {lowering.layout}; use backbone='model'"
        )
    if config.offload is not None:
        return False
    return config.backbone != "model" if lowering.native else config.backbone == "river" and is_decode


def head_twinning(config: RiverConfig, lowering: Lowering) -> Twinning | None:
    """Returns how the twin of the head is made, None where there is none."""
    kind = config.lm_head or ("w4" if lowering.native else "keep")
    return twinning(config, lowering) if kind == "w4" else None
