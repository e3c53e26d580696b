"""Whether drafts of a model can be verified, and by passes of which widths."""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.config import RiverConfig
from river_compile.decoding.kv_cache import why_no_rewind
from river_compile.decoding.passes import Passes
from river_compile.errors import ExactModeError
from river_compile.exits import WHOLE
from river_compile.kernels import MAX_EXACT_ROWS
from river_compile.kernels.native.load import few_rows
from river_compile.record import ModelRecord
from river_compile.upstream.dynamo import OwnCall, current_stance

_LONGEST = 15  # default length of drafts
_LONGEST_STREAMED = 63  # the same if a pass waits for weights to arrive, once for all of its tokens
_LENGTH_SHARED = 5  # of all drafts, if several processes share the model


def allow_drafts(
    passes: Passes, ids_BS: Tensor, logits_B1V: Tensor, max_draft: int | None = None, strict: bool = False
) -> None:
    """Let one row of passes whose prompt has run draft, or raise an ExactModeError with the reason why it cannot."""
    graph, model = passes.graph, passes.model
    if graph is None:
        why_not = _why_not_rewritten(passes.record)
        raise ExactModeError(f"Exact mode requires a model that backend='river' can rewrite: {why_not}")
    check_paths(graph.config)
    if max_draft is None:
        max_draft = _LONGEST_STREAMED if graph.config.moves_weights else _LONGEST
        if passes.agreement.several:
            max_draft = _LENGTH_SHARED
    widths = verification_widths(max_draft)
    if strict:
        widths = _strict_widths(graph, widths, type(model).__name__, model.dtype)
    inputs = passes.prepare_inputs(torch.cat([ids_BS, ids_BS.new_zeros(ids_BS.shape[0], 1)], dim=1), 1)
    given = inputs["input_ids"].shape[1]
    if given != 1:  # CPM-Ant, where every position attends to all others, later ones too
        raise ExactModeError(
            f"Exact mode verifies several new tokens in one pass, and {type(model).__name__} takes the whole text in "
            f"every pass ({given} tokens instead of 1). Use quality='fast', whose output changes"
        )
    if not passes.kv.is_full:
        why_not = why_no_rewind(model, passes.kv.cache)
        raise ExactModeError(f"{why_not}. Use quality='fast', whose output changes")
    passes.widths, passes.is_strict, passes.vocabulary = widths, strict, logits_B1V.shape[-1]


def _strict_widths(graph: GraphRecord, widths: tuple[int, ...], model: str, dtype: torch.dtype) -> tuple[int, ...]:
    """Return widths at which a row has the same bits as alone; raise an ExactModeError if none has."""
    program = graph.program
    assert program is not None, "the prompt ran in it"
    if program.width_matters:
        raise ExactModeError(f"Cannot guarantee strict=True for this {model}: {program.width_matters}", id="RC063")
    most = {width: few_rows(dtype, width) if program.native else MAX_EXACT_ROWS for width in widths}
    return tuple(width for width in widths if width <= most[width])


def verification_widths(max_draft: int) -> tuple[int, ...]:
    """Return the query lengths of verifying passes: powers of two, 6, and max_draft + 1."""
    # Up to about six rows a pass waits for weights; eight cost a third more.
    widths = {2**i for i in range(max_draft.bit_length())} | ({6} if max_draft >= 6 else set())
    return (*sorted(widths), max_draft + 1)


def _why_not_rewritten(record: ModelRecord) -> str:
    """Return why a prompt ran in none of a model's rewritten graphs."""
    graphs = record.of(Graphs)
    if graphs.why_not:
        return f"it refused: {graphs.why_not}"
    if record.find(OwnCall) is not None:
        return f"Dynamo traced no graph of this call, with the stance {current_stance()!r}"
    reached = "this call did not reach it" if graphs else "this model never reached it"
    return f'{reached}. Call model.compile(backend="river")'


def check_paths(config: RiverConfig) -> None:
    """Raise an ExactModeError if a model was compiled without all twins or the whole backbone."""
    if config.prefill != "backbone":
        raise ExactModeError(
            f"prefill={config.prefill!r} is not available in exact mode, since prompts that exit cannot verify drafts. "
            "Use prefill='backbone'",
            id="RC062",
        )
    if config.exit_depth not in (None, WHOLE):
        raise ExactModeError(
            f"Exact mode requires all layers and all twins, and exit_depth={config.exit_depth} compiles one path only. "
            "Remove exit_depth",
            id="RC062",
        )
    if config.deepest is not None:
        raise ExactModeError(
            "Exact mode verifies at full depth, and offload_policy='exit' lets no token go further than layer "
            f"{config.deepest}. Use offload_policy='fetch', the default of accelerate",
            id="RC062",
        )
