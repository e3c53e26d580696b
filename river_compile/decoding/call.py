"""One call of generate: its arguments, the rows that it asks for, and its result.

Not handled: which calls are supported (`mode.py`).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from river_compile.agreement import Agreement
from river_compile.decoding.batch import Rows
from river_compile.decoding.inputs import KNOWN, prepares_as_most_do
from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.processors import STATELESS
from river_compile.decoding.sampling import Sampler
from river_compile.decoding.text import Ends, Text
from river_compile.kernels.native.load import any_rows, loaded
from river_compile.record import record_of
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.transformers import cache_argument, is_transformers_model

_ROW_BY_ROW = {MaxLengthCriteria, EosTokenCriteria, StopStringCriteria}

Generated: TypeAlias = Tensor | GenerateDecoderOnlyOutput


@dataclass(frozen=True)
class Call:
    """The arguments of a ``custom_generate`` callable."""

    model: PreTrainedModel
    ids_BS: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any | None

    def rows(self, agreement: Agreement, drafting: bool, generator: torch.Generator | None = None) -> Text | Rows:
        """Return the call's one row, or its rows, with their prompt; without a generator, sampling uses PyTorch's."""
        config, returns_dict = self.config, bool(self.config.return_dict_in_generate)
        ends = getattr(config, "_eos_token_tensor", None)
        sampler = Sampler(
            rows=len(self.ids_BS),
            do_sample=config.do_sample,
            processors=self.processors,
            agreement=agreement,
            drafting=drafting,
            generator=generator,
            keeps_scores=returns_dict and config.output_scores,
            keeps_logits=returns_dict and config.output_logits,
        )
        common: dict[str, Any] = {
            "prompt": self.ids_BS,
            "sampler": sampler,
            "stops": _ends(self.criteria) or self.criteria,
            "max_length": math.ceil(min(config.max_length, sys.maxsize)),  # generate takes 17.5 and inf too
            "put": None if self.streamer is None else self.streamer.put,
            "end_tokens": frozenset(() if ends is None else ends.tolist()),
            "agreed": agreement.first,
        }
        if len(self.ids_BS) == 1:
            return Text(**common)
        independent = self._row_by_row and not returns_dict
        return Rows(**common, pad_token=self.pad_token, are_independent=independent)

    @property
    def _row_by_row(self) -> bool:
        """Whether processors and criteria see each row alone, without memory."""
        # Without an end token there is no padding, so a row that a stop string ended continues with the others.
        kinds = {type(criterion) for criterion in self.criteria}
        ends_alone = StopStringCriteria not in kinds or EosTokenCriteria in kinds
        return ends_alone and kinds <= _ROW_BY_ROW and all(type(p) in STATELESS for p in self.processors)

    @property
    def pad_token(self) -> int | None:
        """The token of ended rows while others run; None if rows end together."""
        ends = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        pad = self.config._pad_token_tensor
        return int(pad) if ends and pad is not None else None

    def prefix_ids(self, kwargs: Mapping[str, object], strict: bool) -> Tensor | None:
        """Return the ids of a prompt that may use the prefix cache; None if its KV entries depend on more than ids."""
        # With `strict`, entries have the bits of a fresh prompt, so no library may multiply: its sums depend on rows.
        model, ids_BS = self.model, self.ids_BS
        programs = record_of(model.parameters()).find(ProgramCache)
        if programs is None or programs.config.prefill != "backbone":
            return None
        if strict and loaded() and not any_rows(model.dtype):
            return None
        known = is_transformers_model(model) and prepares_as_most_do(model) and KNOWN.issuperset(kwargs)
        if not known or self.config.prefill_chunk_size is not None or len(ids_BS) != 1 or not ids_BS.shape[1]:
            return None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids_BS.shape and bool(mask.all())):
            return None
        expected = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        if positions is not None and not (isinstance(positions, Tensor) and torch.equal(positions.cpu(), expected)):
            return None
        return ids_BS[0].cpu()

    def result(self, ids_BS: Tensor, sampler: Sampler, kv: KVCache, made: Cache | None) -> Generated:
        """Return the result of ``generate``; `made` is the KV cache that generate made, to return."""
        if not self.config.return_dict_in_generate:
            return ids_BS
        if kv.is_full and made is not None:
            kv.copy_to(made)
        return GenerateDecoderOnlyOutput(
            sequences=ids_BS,
            scores=sampler.scores_so_far,
            logits=None if sampler.logits is None else tuple(sampler.logits),
            **{cache_argument(self.model): made if kv.is_full else kv.cache},
        )


def _ends(criteria: StoppingCriteriaList) -> Ends | None:
    """Return stopping criteria as length and end tokens, None if they must be called."""
    if not criteria or any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in criteria):
        return None
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    tokens = [c.eos_token_id.tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    return Ends(min(lengths, default=sys.maxsize), frozenset(itertools.chain(*tokens)))
