"""Logits processors for some rows of a batch: rows that part are given to them a few at a time.

Not handled: processors that remember calls; rows stay together for those.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList, logits_process

# Processors that remember nothing from call to call: drafts, some of which are dropped again, may pass through them.
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


class RowProcessors:
    """Logits processors that are told which rows they are given.

    Args:
        processors: they take rows of one length.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._processors = processors

    def __call__(self, ids_NS: Tensor, scores_NV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns what the processors make of the scores of these rows of the batch."""
        return LogitsProcessorList(_for_rows(p, rows) for p in self._processors)(ids_NS, scores_NV)


def _for_rows(processor: LogitsProcessor, rows: Sequence[int]) -> LogitsProcessor:
    """Returns a processor that holds a number for each row with those of some rows."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or list(rows) == list(range(len(ignored))):
        return processor
    chosen = copy.copy(processor)
    chosen.prompt_ignore_length = ignored[list(rows)]
    return chosen
