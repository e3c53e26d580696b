"""Runs a model's plain steps for exact mode's loop, where a prompt that has run shows that drafts cannot be verified.

The loop then generates as transformers does: one backbone pass for each token, with the same draws from the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.distributed.ranks import Ranks
from river_compile.exits import WHOLE, forced_depth
from river_compile.kept_cache import LentCache
from river_compile.runtime.sequences import Sequences
from river_compile.runtime.stats import ExitStats
from river_compile.state import ModelState
from river_compile.upstream.hf_cache import cache_argument

from .draft import RatesOfModel
from .rates import PassTimes


class PlainRunner:
    """The passes of one call of generate from its prompt on; has what the loop asks of a `DraftVerifyRunner`.

    Args:
        model: the model.
        model_kwargs: of its next forward pass, the prompt's outputs included.
        cache: holds the prompt.
        lent: where longer ones come from.
        state: what is known of the model.
    """

    longest_draft = 0
    can_part = False  # rows keep one token each

    def __init__(
        self, model: PreTrainedModel, model_kwargs: dict[str, Any], cache: Cache, lent: LentCache, state: ModelState
    ) -> None:
        self.model, self.model_kwargs, self.cache, self._lent = model, model_kwargs, cache, lent
        self.stats, self.sequences, self.ranks = state.of(ExitStats), state.of(Sequences), state.of(Ranks)
        self.times, self.rates = PassTimes(), RatesOfModel()
        self._outputs: Any = None

    def width_for(self, drafted: int) -> int:
        """Returns 1: passes are of one token."""
        return 1

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        """Never called: no draft is longer than `longest_draft`."""
        raise AssertionError("a runner without drafts was asked for one")

    def pays_to_select(self, rows: int, tokens: int) -> bool:
        """Returns False: rows stay."""
        return False

    def select(self, rows: Sequence[int]) -> None:
        """Never called: no row leaves."""
        raise AssertionError("a runner whose rows stay was asked to let some leave")

    def make_room(self, tokens: int) -> None:
        """Moves to a longer cache where the next token does not fit."""
        longer = self._lent.longer(self.cache, int(self.cache.get_seq_length()), min(tokens, 1))
        if longer is not None:
            self.cache = longer
            self.model_kwargs = {**self.model_kwargs, cache_argument(self.model): longer}

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Runs the last id through the backbone; returns its logits ``[B, 1, V]``."""
        inputs = self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=1, **self.model_kwargs)
        with forced_depth(WHOLE):
            self._outputs = self.model(**inputs, return_dict=True)
        return self._outputs.logits[:, -1:]

    def rewind(self, slots: int) -> None:
        """Frees nothing: nothing was drafted."""

    def keep(self, kept: Sequence[int], advance: int) -> None:
        """Ends a cycle, which kept one token of each row: masks and positions grow as in plain generation."""
        self.model_kwargs = self.model._update_model_kwargs_for_generation(self._outputs, self.model_kwargs)
