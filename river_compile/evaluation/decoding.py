"""Logits of a given text, computed as generation computes them: a prompt in one pass, then token by token.

One forward pass over a whole text runs through the backbone alone, so it says nothing about tokens that leave early.
Whatever scores a text through the river asks here. Not handled: batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from river_compile.exits import Memory
from river_compile.model_record import find_record
from river_compile.upstream.transformers import cache_argument


class TokenByToken:
    """Decodes texts one after another, all in one static cache.

    Args:
        model: a causal language model, compiled or not.
        room: tokens of the longest text.
    """

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
        self._held = {cache_argument(model): self._cache, "use_cache": True}

    @torch.inference_mode()
    def logits(self, ids_1S: Tensor, first: int) -> Tensor:
        """Returns the logits ``[S - first, V]`` after each token from number `first` on.

        These are decode steps, and what lies before them runs as the prompt. A prompt has two tokens at least: those
        among them that were asked for have the prompt's logits.
        """
        self._begin()
        prompt = min(max(first, 2), ids_1S.shape[1])
        found = [self._step(ids_1S, 0, prompt)[first:]]
        found += [self._step(ids_1S, i, i + 1) for i in range(prompt, ids_1S.shape[1])]
        return torch.cat(found)

    def _begin(self) -> None:
        """Empties the cache and the exit criteria's memory of the last text (a prompt of one token goes on)."""
        self._cache.reset()
        record, keys = find_record(self._model), self._cache.layers[0].keys
        if record is not None and keys is not None:
            record.exit_memories.keep(keys, Memory())

    def _step(self, ids_1S: Tensor, start: int, stop: int) -> Tensor:
        """Returns the logits ``[stop - start, V]``."""
        positions = torch.arange(start, stop, device=ids_1S.device)[None]
        return self._model(input_ids=ids_1S[:, start:stop], position_ids=positions, **self._held).logits[0]
