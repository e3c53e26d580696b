"""The packed weights of a program: which ones it needs, how they are made, and what the report says of them.

Not handled: where they come from (:mod:`river_compile.twins.pack`).
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.exits import WHOLE
from river_compile.kernels.messages import with_id
from river_compile.passes.program import Matmul, Program, RiverProgram, SegmentSpec
from river_compile.record import ModelRecord
from river_compile.system import advise_pageout
from river_compile.twins.backbone_file import has_backbone_file
from river_compile.twins.making import Job, Statistics
from river_compile.twins.pack import TwinWeights
from river_compile.twins.quantize import UNOBSERVED
from river_compile.twins.weights import Parameters, ProgramWeights, TwinWeight
from river_compile.upstream.dynamo import OwnCall

log = logging.getLogger("river_compile.twins")


def tell_of_change(model: ModelRecord, changed: Sequence[TwinWeight], seconds: float) -> None:
    """Report requantized weights: the first time as a warning, later in the log, for training loops."""
    twins = model.of(TwinWeights)
    twins.loss.value, twins.changes, twins.changed = None, twins.changes + 1, len(changed)
    others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    message = (
        f"The weights changed after their 4-bit twins were packed ({changed[0].name}{others}). The twins were packed "
        f"again in {seconds:.1f} s"
    )
    observed = sum(twin.statistics.endswith("observed tokens") for twin in changed)
    if observed:
        message += f", {observed} with the old statistics. river_compile.collect_statistics collects new ones"
    if any(twin.quantizer == UNOBSERVED != twin.asked for twin in changed):
        message += f". Matrices without statistics took quantizer={UNOBSERVED!r}"
    if twins.changes == 1:
        hint = "Later changes are only logged, and counted in the report"
        warnings.warn(with_id("RC048", f"{message}. {hint}"), RiverWarning, stacklevel=2)
    log.info("%s", message)


def can_wait_for_twins(model: ModelRecord, config: RiverConfig) -> bool:
    """Whether a model's programs run at full depth until the twins are there.

    Only exact mode's drafts read them, or tokens whose exit rule is tuned afterwards.
    """
    return model.find(OwnCall) is not None and (config.first_exit == WHOLE or config.budget is not None)


def packed_losslessly(program: RiverProgram | Program) -> list[Matmul]:
    """Return the matmuls whose weights are packed copies without loss."""
    return [x for segment in program.segments for x in segment.packed if x.lossless and not x.in_place]


def is_packed_later(lossless: Sequence[Matmul], model: ModelRecord, config: RiverConfig) -> bool:
    """Whether 12-bit weights that are chosen by default are read from their file, which the background writes."""
    return can_wait_for_twins(model, config) and model.of(TwinWeights).packs_later(lossless)


def waits_for_file(program: Program, inputs: Sequence[Any], model: ModelRecord, config: RiverConfig) -> bool:
    """Whether the 12-bit weights that a program of an earlier process reads by default are in no file yet."""
    lossless = packed_losslessly(program)
    if config.target_weights != "auto" or not is_packed_later(lossless, model, config):
        return False
    return not has_backbone_file(lossless, inputs, model.of(TwinWeights).digests)


def packed_weights(
    program: Program,
    segments: Sequence[SegmentSpec],
    inputs: Sequence[Any],
    model: ModelRecord,
    graph: GraphRecord,
    warn: Callable[[], object],
    refresh: bool,
) -> ProgramWeights | None:
    """Return the packed weights of the matmuls that the passes made and tokens can reach."""
    twins, statistics, start = model.of(TwinWeights), model.of(Statistics).now(), time.perf_counter()
    config, how = graph.config, graph.config.target_weights
    with graph.stage("packing"):
        packable = [linear for segment in segments for linear in segment.packed]
        reached = [linear for linear in packable if linear.lossless or program.twins]
        if how == "12bit" and not any(linear.lossless for linear in packable):
            raise OptionError(
                "target_weights='12bit' requires bfloat16 weights, and no matrix of the layers has any. Call "
                "model.to(torch.bfloat16), or use target_weights='model'",
                id="RC004",
            )
        weights = None
        if reached:
            weights = twins.find(reached, _job(program, reached, inputs, model, config, statistics, refresh))
            twins.seconds += time.perf_counter() - start
    packed = {} if weights is None else weights.packed
    graph.twins = tuple(made for made in packed.values() if not made.matmul.lossless)
    digests = {(twin.name, twin.asked): twin.digest for twin in graph.twins}
    for other in model.of(Graphs):  # rebuilt at its next run
        other.twins = tuple(t for t in other.twins if digests.get((t.name, t.asked), t.digest) == t.digest)
    lossless = [linear for linear in packed if linear.lossless]
    smaller = [linear for linear in lossless if not packed[linear].weight.unpacked]
    if how == "8bit" and not smaller:
        raise OptionError(
            "target_weights='8bit' requires weights that are 8-bit numbers times a scale for each row or group, as in "
            "a file in Q8_0 or of compressed-tensors. This model has none in the dtype of the file's scales. Load it "
            "with dtype='auto', or use target_weights='model'",
            id="RC004",
        )
    # Every time, since quantizing has just read the parameters again. MXFP4 experts are read where they lie.
    replaced = {i for linear in smaller for i in linear.weights if not linear.in_place}
    if config.exit_depth == 0 and config.prefill == "exit":  # twins run prompts too
        read = {slot for segment in segments for slot in segment.inputs}
        read |= {i for linear in packed for i in linear.weights if linear.in_place}
        replaced |= {i for linear in packed for i in linear.weights} - read
    graph.paged_out_bytes = advise_pageout({id(inputs[i]): inputs[i] for i in replaced}.values())
    if graph.twins:
        warn()
    return weights


def _job(
    program: Program,
    reached: Sequence[Matmul],
    inputs: Sequence[Any],
    model: ModelRecord,
    config: RiverConfig,
    statistics: Statistics,
    refresh: bool,
) -> Job:
    """Return how weights of a program are made: from which parameters, and by which file."""
    twins = model.of(TwinWeights)
    savable = [matmul for segment in program.segments for matmul in segment.packed if not matmul.lossless]
    parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in (*reached, *savable)}
    can_wait, digests = can_wait_for_twins(model, config), twins.digests.of(parameters)
    blocks = frozenset(matmul for segment in program.twins for matmul in segment.packed)
    job = Job(config, statistics, program.device, parameters, digests, refresh, can_wait, blocks=blocks)
    has_twins = any(not matmul.lossless for matmul in parameters)  # a prompt's program may have none
    if config.twins is None or not has_twins or refresh:
        return job
    return twins.with_file(job, savable, program.matrices)
