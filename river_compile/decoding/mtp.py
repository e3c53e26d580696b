"""Drafts by a checkpoint's own layers for multi-token prediction (MTP), which read the model's last hidden states.

A draft has a token for each of these layers at most. Not handled: texts some of whose hidden states are unknown, such
as those of a batch's rows and of prompts that came as embeddings; other sources draft these.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.agreement import Agreement
from river_compile.decoding.draft_length import MTP
from river_compile.decoding.passes import Passes
from river_compile.errors import RiverWarning
from river_compile.kernels.messages import with_id
from river_compile.record import ModelRecord, record_of
from river_compile.upstream.mtp import MtpLayers, crop, why_no_mtp


class _Loaded:
    """A model's MTP layers, or why there are none."""

    layers: MtpLayers | None = None
    why_not = ""
    told = False  # whether a warning said that its programs keep no hidden states


class _Layer:
    """What one layer has read of a text."""

    # Position p is that of a hidden state: layer k combines it with token p + 1 + k, and proposes token p + 2 + k.
    def __init__(self) -> None:
        self.entries = 0  # positions in its KV cache
        self.first = 0  # position of the first of its inputs
        self.inputs: Tensor | None = None  # hidden states [1, T, D] from there on: of the layer before, or of the model

    @property
    def end(self) -> int:
        """The position behind its inputs."""
        return self.first + (0 if self.inputs is None else self.inputs.shape[1])

    def add(self, hidden_1TD: Tensor) -> None:
        self.inputs = hidden_1TD if self.inputs is None else torch.cat([self.inputs, hidden_1TD], dim=1)

    def unread(self) -> Tensor:
        """Return its inputs that have no entries."""
        assert self.inputs is not None, "the layer before has run"
        return self.inputs[:, self.entries - self.first :]

    def rewind(self, entries: int, end: int) -> None:
        """Keep the first entries, and the inputs up to a position that have none."""
        if self.inputs is not None:
            self.inputs = self.inputs[:, entries - self.first : end - self.first]
        self.entries = self.first = entries


class Mtp:
    """A checkpoint's MTP layers, with a KV cache for the text of one call."""

    source = MTP
    least_probability = 0.0

    def __init__(self, passes: Passes, head: MtpLayers) -> None:
        self._passes, self._head = passes, head
        self.longest = len(head)
        self._layers: list[_Layer] = []  # of the present text; none: they cannot draft it
        self._cache: Any = None
        self._padding = self._steps = 0  # steps: of the present draft

    def begin(self, ids_1S: Tensor, padding: int) -> None:
        hidden = self._passes.take_hidden()
        if hidden is None or hidden.shape[:2] != (1, ids_1S.shape[1] - 1):
            self._explain()
            return
        self._padding, self._steps = padding, 0
        self._head.tie(self._passes.model)
        self._layers = [_Layer() for _ in range(self.longest)]
        self._cache = self._head.new_cache()
        self._layers[0].add(self._head.normed(hidden[:, padding:]))

    def can_draft(self, tokens: int) -> bool:
        return bool(self._layers)

    def behind(self, tokens: int) -> int:
        return 0  # what others drafted is read in the next step

    def step(self, ids_1S: Tensor) -> Tensor:
        number, layer = self._steps, self._layers[self._steps]
        self._steps += 1
        first = layer.entries + 1 + number
        ids_1T = ids_1S[:, self._padding + first :]
        hidden_1TD = self._head.run(number, layer.unread(), ids_1T, first, self._cache)
        layer.entries = layer.end
        if self._steps < self.longest:
            self._layers[self._steps].add(hidden_1TD)
        return self._head.logits(hidden_1TD).to(ids_1S.device)

    def end(self, steps: int) -> None:
        pass

    def rewind(self, tokens: int) -> None:
        hidden = self._passes.take_hidden()
        if not self._layers:
            return
        tokens, self._steps = tokens - self._padding, 0
        new = tokens - self._layers[0].end
        if hidden is None or hidden.shape[1] < new:
            self._explain("a pass ran outside of River's graphs")
            self.close()
            return
        self._layers[0].add(self._head.normed(hidden[:, :new]))
        end = tokens
        for number, layer in enumerate(self._layers):
            sure = min(layer.entries, max(tokens - 1 - number, 0))  # entries that were made of tokens of the text
            crop(self._cache, number, layer.entries - sure)
            layer.rewind(sure, end)
            end = sure

    def close(self) -> None:
        self._layers, self._cache = [], None
        self._head.untie()

    def _explain(self, why_not: str = "") -> None:
        """Warn once, if no text of the model can be drafted or with a reason."""
        passes = self._passes
        program = None if passes.graph is None else passes.graph.program
        loaded = passes.record.of(_Loaded)
        if not why_not and program is not None and program.hidden is None:
            why_not = "its head reads more than one value"
        if loaded.told or not why_not:
            return
        loaded.told = True
        message = f"the MTP layers of {type(passes.model).__name__} do not draft: {why_not}"
        warnings.warn(with_id("RC068", message), RiverWarning, stacklevel=3)


def mtp_layers(record: ModelRecord) -> MtpLayers:
    """Return the MTP layers that :func:`why_not_mtp` has loaded."""
    layers = record.of(_Loaded).layers
    assert layers is not None, "a call without them is refused"
    return layers


def why_not_mtp(model: PreTrainedModel) -> str:
    """Load a model's MTP layers if that was not tried; return why they cannot draft and the fix, or nothing."""
    loaded = record_of(model.parameters()).of(_Loaded)
    if not loaded.why_not:
        loaded.why_not = load_mtp(model)
    return loaded.why_not


def load_mtp(model: PreTrainedModel) -> str:
    """Load a model's MTP layers if they are not there; return why they cannot draft and the fix, or nothing."""
    record = record_of(model.parameters())
    loaded = record.of(_Loaded)
    if record.of(Agreement).several:
        return "several processes share the model. Remove it"
    if loaded.layers is not None and loaded.layers.fit(model):  # else the model has moved
        return ""
    why_not = why_no_mtp(model)
    if why_not:
        return why_not
    try:
        loaded.layers = MtpLayers(model)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"its MTP layers cannot be loaded from {model.config.name_or_path!r} ({reason}). Remove it"
    return ""
