"""One compiled model seen as two on one KV cache: the river, a token at a time, and the backbone, several at once.

Inputs are prepared by transformers' own methods, so masks and positions are those of plain generation. The cache is
rewound with `crop`; the class counts its slots itself, because reading a length back from an accelerator would wait.

A strict instance verifies through a graph of its own, whose rows have the bits of one token per pass. Before it uses a
width for the first time it runs the same tokens one by one and compares logits and cache to the bit; a width that fails
is told in a warning and not used.

Not handled (refused with the reason): caches that cannot be rewound, encoder-decoder models, models whose forward
passes the river backend did not rewrite.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from river_compile.errors import RiverWarning
from river_compile.runtime.executor import forced_depth
from river_compile.runtime.trace import ExactStats, ExitStats
from river_compile.state import ModelState, state_of_model

from .batch_invariant import entries, same_rows_of


def verification_widths(max_draft: int, strict: bool = False) -> tuple[int, ...]:
    """Returns the query lengths at which the backbone verifies.

    Powers of two, the last one max_draft + 1; every length up to it for strict verification, where each row costs.
    """
    if strict:
        return tuple(range(1, max_draft + 2))
    widths = [1]
    while widths[-1] < max_draft + 1:
        widths.append(min(2 * widths[-1], max_draft + 1))
    return tuple(widths)


class TwoPaths:
    """The forward passes of one call of generate.

    Args:
        model: the compiled model.
        model_kwargs: what generate prepared for its forward passes; the cache among them.
        widths: query lengths at which the backbone may verify, ascending from 1.
        strict: whether verification must give the bits of one token per pass.
    """

    def __init__(self, model: PreTrainedModel, model_kwargs: dict, widths: Sequence[int], strict: bool = False) -> None:
        self.model = model
        self.model_kwargs = model_kwargs
        self._widths = tuple(widths)
        self._strict = strict

    def prefill(self, ids_BS: Tensor, config: GenerationConfig) -> Tensor:
        """Runs the prompt and returns the logits ``[B, 1, V]`` of its last position.

        Raises:
            ValueError: the cache cannot be rewound, or the river backend did not rewrite the model.
        """
        outputs = self.model._prefill(ids_BS, config, self.model_kwargs, not config.is_assistant)
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)
        self.cache: Cache = self.model_kwargs["cache"]
        if not self.cache.is_croppable:
            raise ValueError(f"exact mode rewinds the KV cache after every draft, and {_not_croppable(self.cache)}")
        self._state = _rewritten_state(self.model)
        self._same_rows = same_rows_of(self.model, self._state) if self._strict else None
        self.cache.activate_past_recording()  # sliding windows that grow keep what a rewind brings back
        self._static = all(isinstance(layer, StaticLayer) for layer in self.cache.layers)
        self._filled = int(self.cache.get_seq_length())
        self._kept = self._filled + 1
        return outputs.logits[:, -1:]

    @property
    def model_id(self) -> int:
        """Identifies the model in traces."""
        return self._state.of(ExitStats).model_id

    @property
    def stats(self) -> ExactStats:
        """Counts the model's cycles."""
        return self._state.of(ExitStats).exact

    def width_for(self, drafted: int) -> int:
        """Returns the smallest verification width for a number of drafted tokens."""
        return next(w for w in (*self._usable, *self._widths) if w > drafted)

    @property
    def longest_draft(self) -> int:
        """How many tokens can be drafted and verified in the slots that the cache has left."""
        capacity = self.cache.get_max_length() if self._static else -1
        free = self._widths[-1] if capacity < 0 else capacity - self._filled
        return max((w for w in self._usable if w <= free), default=1) - 1

    @property
    def _usable(self) -> list[int]:
        """The widths but those that were found to give other bits than strict verification allows."""
        if self._same_rows is None:
            return list(self._widths)
        return [w for w in self._widths if self._same_rows.verdicts.get(self._verdict_key(w), True)]

    def _verdict_key(self, width: int) -> tuple[int, int | None, int]:
        batch = self.cache.layers[0].keys.shape[0]
        return batch, self.cache.get_max_length() if self._static else None, width

    def river(self, ids_BS: Tensor) -> Tensor:
        """Runs the last id through the whole river, one slot further; returns the next token's logits ``[B, V]``."""
        with forced_depth(0):
            return self._forward(ids_BS, 1)[:, -1]

    def backbone(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Runs the last verified id and the `drafted` ids behind it through the backbone.

        Returns:
            The logits ``[B, drafted + 1, V]``. The pass is as wide as one of the fixed widths: copies of the last id
            fill it up, whose logits are dropped and whose slots the next rewind frees.
        """
        width = self.width_for(drafted)
        filler = width - drafted - 1
        if filler:
            ids_BS = torch.cat([ids_BS, ids_BS[:, -1:].expand(-1, filler)], dim=-1)
        with forced_depth(self._state.of(ExitStats).num_blocks):  # (a pass of width 1 is a decode step)
            if self._same_rows is not None and width > 1 and self._verdict_key(width) not in self._same_rows.verdicts:
                return self._try_out(ids_BS, width)[:, : drafted + 1]
            return self._forward(ids_BS, width, strict=self._strict)[:, : drafted + 1]

    def _try_out(self, ids_BS: Tensor, width: int) -> Tensor:
        """Runs the last ids at once and one by one, notes whether the bits agree, and returns the latter's logits."""
        wide = self._forward(ids_BS, width, strict=True)
        wide_entries = entries(self.cache)
        self.rewind(width)
        ends = range(ids_BS.shape[1] - width + 1, ids_BS.shape[1] + 1)
        narrow = torch.cat([self._forward(ids_BS[:, :end], 1) for end in ends], dim=1)
        same = torch.equal(wide, narrow) and all(map(torch.equal, wide_entries, entries(self.cache)))
        self._same_rows.verdicts[self._verdict_key(width)] = same
        if not same:
            warnings.warn(
                f"strict=True: in {type(self.model).__name__} a pass of {width} tokens rounds differently from one of "
                "a single token, so no draft is verified at that width; the text stays exact but comes slower",
                RiverWarning,
                stacklevel=2,
            )
        return narrow

    def rewind(self, slots: int) -> None:
        """Frees the last slots of the cache."""
        if self._static and not slots:
            return
        self._filled -= slots
        self.cache.crop(-slots)  # (where nothing is freed, this still trims a sliding window that grows)
        if not self._static:  # a cropped view has other strides than a grown cache: the graphs are compiled for those
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()

    def keep(self, tokens: int) -> None:
        """Ends a cycle that kept this many tokens: masks and positions grow, all slots but the kept ones are freed.

        The last kept token has no slot yet, as in plain generation.
        """
        self.model_kwargs = self._lengthened(tokens)
        self._kept += tokens
        self.rewind(self._filled - (self._kept - 1))

    def _lengthened(self, tokens: int) -> dict:
        if not tokens:
            return dict(self.model_kwargs)
        return self.model._update_model_kwargs_for_generation({}, dict(self.model_kwargs), num_new_tokens=tokens)

    def _forward(self, ids_BS: Tensor, width: int, strict: bool = False) -> Tensor:
        """Runs the last `width` ids, the first of which stands in slot `filled`, and returns their logits."""
        kwargs = self._lengthened(self._filled + width - self._kept)
        if width > 1 and "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = 0  # all of them; any other number would be a graph of its own
        inputs = self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=width, **kwargs)
        if strict and width > 1:
            logits = self._same_rows(self.model, **inputs, return_dict=True).logits
        else:
            logits = self.model(**inputs, return_dict=True).logits
        self._filled += width
        return logits


def _rewritten_state(model: PreTrainedModel) -> ModelState:
    """Returns what the backend knows of a model that has just run.

    Raises:
        ValueError: the model never reached the backend, or was compiled so that exact mode cannot work.
    """
    state = state_of_model(model, "exact mode")
    latest = state.graphs[-1]
    if latest.refusal:
        raise ValueError(f"exact mode needs a model that the river backend can rewrite; it refused: {latest.refusal}")
    if latest.config.prefill != "backbone":
        raise ValueError(
            f"prefill={latest.config.prefill!r} lets prompts leave the backbone, so nothing could verify the drafts; "
            'compile the model with prefill="backbone"'
        )
    if latest.config.fill != "river":
        raise ValueError(
            f"exact mode drafts with the river, which fill={latest.config.fill!r} replaces; compile the model with "
            "fill='river'"
        )
    if latest.config.exit_depth is not None:
        raise ValueError(
            f"exit_depth={latest.config.exit_depth} leaves only one path in the compiled model; exact mode needs the "
            "whole river and the whole backbone: compile it without exit_depth"
        )
    if latest.config.deepest is not None:
        raise ValueError(
            f"offload={latest.config.offload} with offload_policy='exit' makes every token leave by that depth; exact "
            "mode verifies with the whole backbone: compile the model with offload_policy='fetch'"
        )
    return state


def _not_croppable(cache: Cache) -> str:
    kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers if not layer.is_croppable}))
    return (
        f"this cache cannot give entries back ({kinds}). A static sliding window must be at least as long as the whole "
        "text (fewer new tokens); a dynamic cache always works with attention layers"
    )
