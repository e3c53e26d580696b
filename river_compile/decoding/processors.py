"""Apply transformers' logits processors; those that search the vocabulary for a few tokens, by those tokens alone.

Scores are the processors' own, to the bit. Not handled: subclasses, whose own code runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList, logits_process

# Processors without memory: drafts, some of which are rejected, may pass through them.
STATELESS = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.MinPLogitsWarper,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)


def _before_end(processor: Any, length: int) -> Tensor | None:
    return processor.eos_token_id if length < processor.min_length else None


def _before_new_end(processor: Any, length: int) -> Tensor | None:
    new = length - processor.prompt_length_to_skip
    return processor.eos_token_id if new < processor.min_new_tokens else None


def _at_begin(processor: Any, length: int) -> Tensor | None:
    return processor.begin_suppress_tokens if length == processor.begin_index else None


# Returns the tokens that a processor of this class bars after `length` ids; None: none. Transformers compares each
# entry of the vocabulary with them.
BARRED: dict[type[LogitsProcessor], Callable[[Any, int], Tensor | None]] = {
    logits_process.MinLengthLogitsProcessor: _before_end,
    logits_process.MinNewTokensLengthLogitsProcessor: _before_new_end,
    logits_process.SuppressTokensAtBeginLogitsProcessor: _at_begin,
    logits_process.SuppressTokensLogitsProcessor: lambda processor, _: processor.suppress_tokens,
}


def bars(processors: Sequence[LogitsProcessor], token: int, length: int) -> bool:
    """Whether one of these processors, all of classes in `BARRED`, bars a token after `length` ids."""
    barred = (BARRED[type(processor)](processor, length) for processor in processors)
    return any(tokens is not None and token in tokens.tolist() for tokens in barred)


def processed(processors: Sequence[LogitsProcessor], ids_NS: Tensor, scores_NV: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the scores after processors, which take rows of one length."""
    for processor in processors:
        barred = BARRED.get(type(processor))
        if barred is None:
            scores_NV = LogitsProcessorList([_for_rows(processor, rows)])(ids_NS, scores_NV)
            continue
        tokens = barred(processor, ids_NS.shape[1])
        if tokens is not None:
            known = tokens[(tokens >= 0) & (tokens < scores_NV.shape[1])].to(scores_NV.device)
            scores_NV = scores_NV.index_fill(1, known, -math.inf)
    return scores_NV


def _for_rows(processor: LogitsProcessor, rows: Sequence[int]) -> LogitsProcessor:
    """Return the processor, restricted to these rows if it holds a number for each row."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or list(rows) == list(range(len(ignored))):
        return processor
    chosen = copy.copy(processor)
    chosen.prompt_ignore_length = ignored[list(rows)]
    return chosen
