"""Given texts, decoded as generation decodes them: a prompt in one pass, then token by token, on one static cache.

One forward pass over a whole text runs through the backbone alone, so it says nothing about tokens that leave early.
Whatever scores texts through the river asks here.

Not handled: batches, and models whose forward passes need more than ids, masks and positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.decoding.session import Session
from river_compile.model_record import record_of
from river_compile.runtime.kv_cache import KVCache
from river_compile.twins.observe import full_attention_mask as everything_counts
from river_compile.upstream.transformers import cache_argument


class AfterPrompt(NamedTuple):
    """What a prompt left: its session, the fields of each cache layer, and what exits remember of it."""

    session: Session
    layers: list[dict[str, Tensor | int]]
    entropy: Tensor | None


class TextDecoder:
    """Decodes texts one after another.

    Args:
        model: a causal language model, compiled or not.
        capacity: tokens of the longest text.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self._model = model
        self._memories = record_of(model.parameters()).exit_memories
        self._kv = KVCache.of(model, capacity)

    @property
    def cache(self) -> Cache:
        """The KV cache of the text that ran last."""
        return self._kv.cache

    def prompt(self, ids_1S: Tensor) -> Tensor:
        """Runs a prompt on the emptied cache; returns its logits ``[S, V]``."""
        self.cache.reset()
        self._kv.take_in()
        self._memories.of(self.cache.layers[0].keys).entropy = None  # (a prompt of one token would go on)
        kwargs = {cache_argument(self._model): self.cache, "use_cache": True, **everything_counts(self._model, ids_1S)}
        self._session = Session(self._model, kwargs, self._kv)
        logits = self._session.prefill(ids_1S, GenerationConfig(), all_logits=True)[0]
        self._kv = self._session.kv
        return logits

    def step(self, ids_1S: Tensor) -> Tensor:
        """Runs the last token of a text, all before it being in the cache; returns its logits ``[V]``."""
        return self._session.step(ids_1S)[0, -1]

    @torch.inference_mode()
    def logits(self, ids_1S: Tensor, first: int) -> Tensor:
        """Returns the logits ``[S - first, V]`` after each token from number `first` on.

        These are decode steps, and what lies before them runs as the prompt. A prompt has two tokens at least (one
        would go on with the sequence before it): those among them that were asked for have the prompt's logits.
        """
        prompt = min(max(first, 2), ids_1S.shape[1])
        found = [self.prompt(ids_1S[:, :prompt])[first:]]
        found += [self.step(ids_1S[:, : i + 1])[None] for i in range(prompt, ids_1S.shape[1])]
        return torch.cat(found)

    def save(self) -> AfterPrompt:
        """Returns copies of what the prompt that just ran left."""
        layers = [{name: _copied(v) for name, v in vars(layer).items() if _counts(v)} for layer in self.cache.layers]
        return AfterPrompt(self._session, layers, self._memories.of(self.cache.layers[0].keys).entropy)

    def resume(self, saved: AfterPrompt) -> None:
        """Goes on after a prompt that was saved."""
        self._session = saved.session
        for layer, held in zip(self.cache.layers, saved.layers, strict=True):
            for name, value in held.items():
                if isinstance(value, Tensor):
                    getattr(layer, name).copy_(value)
                else:
                    setattr(layer, name, value)
        self._session.kv.filled = int(self.cache.get_seq_length())
        self._memories.of(self.cache.layers[0].keys).entropy = saved.entropy


def _counts(value: object) -> bool:
    return isinstance(value, (Tensor, int))


def _copied(value: Tensor | int) -> Tensor | int:
    return value.clone() if isinstance(value, Tensor) else value
