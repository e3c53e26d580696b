"""Decides once how a graph is built: kernels, exits, passes.

Not handled: compiling segments (:mod:`river_compile.lowering`), quantizing weights (:mod:`river_compile.twins`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.exits import CRITERIA, WHOLE, ExitPolicy
from river_compile.kernels.measured import Shapes, worth_12_bits
from river_compile.kernels.native.build import choose_isa
from river_compile.passes.backbone import model_matmuls, own_matmuls, packed_backbone
from river_compile.passes.edits import Pass
from river_compile.passes.experts import is_mxfp4
from river_compile.passes.fusion.rules import fuse_backbone, fuse_checks, fuse_twins
from river_compile.passes.heads import exit_checks, find_logits, logits_entropy, rescored_head, vocab_blocks
from river_compile.passes.nodes import input_name, is_parameter, is_tensor, value_of
from river_compile.passes.program import DecoderPlan, Lowering, RiverProgram
from river_compile.passes.twins import TwinSpec, one_row_head, twin_head, twin_layers
from river_compile.system import memory_bytes

_MOST_OF_MEMORY = 0.25  # that 12-bit weights may take by default


@dataclass(frozen=True)
class Choices:
    """The decisions for one graph."""

    config: RiverConfig
    lowering: Lowering
    policy: ExitPolicy  # when tokens exit
    twin_spec: TwinSpec | None  # of the blocks; None: twins keep the 16-bit weights
    head_spec: TwinSpec | None  # None: tokens that exited use the 16-bit head
    has_own_matmuls: bool  # whether the 16-bit blocks use River's kernels
    target_weights: str  # that these read: the "model"'s, or packed as "12bit" or "8bit"
    worth_12_bits: Callable[[Shapes], Collection[tuple[int, int]]]  # which weights are to have 12 bits


def choose(program: RiverProgram, config: RiverConfig, lowering: Lowering) -> Choices:
    """Decide how to build a program; raise an OptionError for options that contradict each other or the model."""
    plan = program.plan
    config.check_depths(plan.num_blocks)
    twin_spec = None
    if lowering.layout is not None:
        twin_spec = TwinSpec(config.group_size, lowering.layout, scale_inputs=config.quantizer == "awq")
    head = config.lm_head or ("w4" if lowering.native else "keep")
    has_own_matmuls, auto = _uses_own_matmuls(config, lowering), config.target_weights == "auto"
    return Choices(
        config=config,
        lowering=lowering,
        policy=_exit_policy(program, config),
        twin_spec=twin_spec,
        head_spec=twin_spec if head == "w4" else None,
        has_own_matmuls=has_own_matmuls,
        target_weights=_backbone_weights(program, config, lowering, has_own_matmuls),
        worth_12_bits=functools.partial(worth_12_bits, many_rows=config.first_exit == WHOLE) if auto else tuple,
    )


def passes_for(choices: Choices, plan: DecoderPlan) -> list[Pass]:
    """Return the passes in order."""
    lowering, policy = choices.lowering, choices.policy
    leaves, candidates = policy.may_leave(plan.num_blocks), policy.candidates(plan.num_blocks)
    passes: list[Pass] = []
    head = choices.head_spec if leaves else None
    if leaves:
        passes.append(twin_layers(choices.twin_spec))
        if head is not None:
            passes.append(twin_head(head))
        elif choices.twin_spec is not None and (plan.is_decode or not lowering.fuse):
            passes.append(one_row_head(lowering.fuse))
    if choices.has_own_matmuls:
        passes.append(own_matmuls(lowering.dense_layout))
    if candidates:
        passes.append(exit_checks(candidates))
    if policy.criterion.reads == "previous":
        passes.append(logits_entropy)
    if lowering.fuse and leaves and not lowering.native:
        # Before the backbone's rules, since it takes a block's last addition.
        passes.append(fuse_checks)
    if choices.has_own_matmuls:
        passes.append(fuse_backbone(lowering.dense_layout))
    if lowering.fuse and leaves:
        passes.append(fuse_twins(lowering.dense_layout))
    if head is not None:
        passes.append(rescored_head)
        if lowering.native and plan.is_decode:
            passes.append(vocab_blocks)
    return [*passes, *packing_for(choices)]


def packing_for(choices: Choices) -> list[Pass]:
    """Return the last pass, which depends on `target_weights` as no other does; none if no weights can be packed."""
    if not choices.has_own_matmuls or not (choices.lowering.native or choices.target_weights != "model"):
        return []
    return [packed_backbone(choices.target_weights, choices.worth_12_bits)]


def _exit_policy(program: RiverProgram, config: RiverConfig) -> ExitPolicy:
    """Return when tokens exit; raise an OptionError if the criterion reads logits and the model has none."""
    policy = config.exit_policy(program.plan)
    if policy.criterion.reads == "previous" and find_logits(program) is None:
        raise OptionError(
            f"criterion={config.criterion!r} reads the logits, and this model returns none (its output is as wide as "
            "its hidden state). Compile the model with its head, or use criterion='similarity'",
            id="RC004",
        )
    return policy


def _backbone_weights(program: RiverProgram, config: RiverConfig, lowering: Lowering, has_own_matmuls: bool) -> str:
    """Return "model", "12bit" or "8bit"; raise an OptionError if the kernels cannot read what was asked for."""
    asked = config.target_weights
    if asked == "auto":
        can = lowering.native and has_own_matmuls and _is_bfloat16(program) and choose_isa().name != "portable"
        return "12bit" if can else "model"
    if asked == "12bit" and has_own_matmuls and not lowering.native:
        return asked
    if asked != "model" and not (has_own_matmuls and lowering.native):
        on_gpu = ", and on a GPU for target_kernels='river'" if asked == "12bit" else ""
        raise OptionError(
            f"target_weights={asked!r} requires the C++ kernels on a CPU{on_gpu}. The 16-bit layers of this model use "
            "other kernels. Use target_weights='model'",
            id="RC004",
        )
    if asked == "12bit" and choose_isa().name == "portable":
        raise OptionError(
            "target_weights='12bit' requires a processor with AVX2. Use target_weights='model'", id="RC004"
        )
    return asked


def check_kernels_read_mxfp4(program: RiverProgram) -> None:
    """Raise an OptionError if a rewritten program has MXFP4 experts that no C++ kernel reads."""
    for segment in program.segments:
        for node in segment.graph.find_nodes(op="placeholder"):
            if is_tensor(node) and is_mxfp4(node):
                raise OptionError(
                    f"{input_name(segment.origins[node])} has MXFP4 weights, which only the C++ kernels of experts "
                    "read: on a CPU, in bfloat16, without adapters on experts, offloading, or options that choose "
                    "other kernels (kernels=, target_kernels=). Load the model by transformers for these, which "
                    "dequantizes it",
                    id="RC004",
                )


def has_room(program: RiverProgram) -> bool:
    """Whether the packed weights of blocks and head, which no file backs at first, take a small part of the memory."""
    nodes = {node for segment in (*program.blocks, program.head) for node in segment.inputs if is_parameter(node)}
    nodes = {node for node in nodes if not is_mxfp4(node)}  # not packed
    return sum(0.75 * value_of(node).nbytes for node in nodes) <= _MOST_OF_MEMORY * memory_bytes()


def _is_bfloat16(program: RiverProgram) -> bool:
    return any(is_parameter(node) and value_of(node).dtype == torch.bfloat16 for node in program.blocks[0].inputs)


def _uses_own_matmuls(config: RiverConfig, lowering: Lowering) -> bool:
    """Whether the 16-bit blocks use River's kernels; raises an OptionError if they are asked for and missing."""
    # By default on a CPU only: the generated kernels sum in another order than the model.
    if config.target_kernels == "river" and not lowering.fuse:
        raise OptionError(
            "target_kernels='river' requires the C++ kernels or the generated ones. This model is lowered by "
            f"{lowering.compiler} with layout {lowering.layout}. Use target_kernels='model' or kernels='auto'",
            id="RC004",
        )
    if config.moves_weights:
        return False
    return config.target_kernels != "model" if lowering.native else config.target_kernels == "river"


def why_width_matters(program: RiverProgram, choices: Choices) -> str:
    """Return why a token's bits may depend on the tokens in its pass at full depth; empty if they do not."""
    config, how = choices.config, choices.target_weights
    if not choices.has_own_matmuls:
        return "its backbone's matmuls are not River's own, which sum alike in all passes; use target_kernels='river'"
    if choices.lowering.native:
        left = next(model_matmuls(program), None)
        if left is not None:
            return f"{left} is multiplied by the model's operator: no kernel reads its form"
        missed = next(
            (f for f in program.fusions if f.missed and f.rule == "attention" and f.segment[:5] == "block"), None
        )
        return "" if missed is None else f"attention of {missed.segment} is the model's operator's ({missed.missed})"
    missed = next((f for f in program.fusions if f.missed and f.segment.startswith(("block", "head"))), None)
    if missed is not None:
        return f"not all of {missed.segment} is the generated kernels' ({missed.rule}: {missed.missed})"
    if how != "model":
        return f"one row of weights in {how} has a kernel of its own; use target_weights='model'"
    checks = config.first_exit < program.plan.num_blocks and CRITERIA[config.criterion].reads == "block"
    if config.exit_depth is None and checks:
        return (
            f"exit checks by criterion={config.criterion!r} end layers of decode steps otherwise; use "
            "criterion='confidence'"
        )
    return ""
