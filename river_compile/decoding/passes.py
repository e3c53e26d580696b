"""The passes of one call of generate: so many ids at such a depth, on the call's KV cache.

Within a call the model, its configuration, hooks and weights must not change; a change takes effect with the next call.
Not handled: the prompt (`prompt.py`); how a pass comes by its program (`bound.py`); which drafts are allowed
(`admission.py`).
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.agreement import Agreement
from river_compile.building.graph_record import GraphRecord
from river_compile.decoding.bound import BoundPrograms
from river_compile.decoding.inputs import (
    BY_SLOT,
    Inputs,
    MovedInputs,
    extended_inputs,
    selected_inputs,
    with_all_logits,
)
from river_compile.decoding.kv_cache import KVCache, slots_for
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.decoding.vocab_blocks import VocabBlocks
from river_compile.errors import CacheFullError
from river_compile.model_state import ModelState
from river_compile.record import record_of
from river_compile.runtime.state import StepState
from river_compile.runtime.stats import ExitStats
from river_compile.tracing.forward import named_arguments
from river_compile.tracing.program_for import ModelRan
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.transformers import cache_argument

_WORTH_GRAPHS = 200  # tokens of one row that pay for compiling its graphs, which takes as long as hundreds of passes


class PromptRows(set[int]):
    """The numbers of rows that a model's prompts had so far."""


class Passes:
    """What runs the passes of one call."""

    def __init__(
        self,
        model: PreTrainedModel,  # compiled or not
        kwargs: Mapping[str, Any],  # that generate prepared for the forward passes
        kv: KVCache,  # may hold the prompt's first tokens
        depth: int | None = None,  # backbone blocks of decode steps, `WHOLE` for all; None: by the exit policy
        state: ModelState | None = None,  # None: not known
        keeps_text: bool = False,  # whether the next call may reuse the text
        keeps_hidden: bool = False,  # whether a drafter reads the last hidden states
    ) -> None:
        self.model, self.kv, self.depth = model, kv, depth
        self.kwargs = {**kwargs, cache_argument(model): kv.cache}
        self.kwargs_tokens = 0  # tokens of the masks and positions in them; 0 before the prompt
        self.record = record_of(model.parameters())
        self.state, self._keeps_text = state, keeps_text
        self.programs = BoundPrograms(model, self.record, state, keeps_hidden)
        self._ran: StepState | ModelRan | None = None  # by the latest pass, if hidden states are kept
        self._hidden: list[Tensor] = []  # of the prompt's pieces and of verifying passes, until they are taken
        self.widths: tuple[int, ...] = (1,)  # query lengths of verifying passes, ascending
        self._vocab_blocks: VocabBlocks | None = None
        self.vocabulary = 0  # logits of a token
        self.is_strict = False
        self.reset()

    @property
    def graph(self) -> GraphRecord | None:
        """The graph that the prompt ran in."""
        return self.programs.graph

    @property
    def stats(self) -> ExitStats:
        """Counters of the model's steps."""
        return self.record.of(ExitStats)

    @property
    def agreement(self) -> Agreement:
        """Of the processes that run the model."""
        return self.record.of(Agreement)

    @property
    def runs_late(self) -> bool:
        """Whether calls on the model's device return before they have run."""
        return self.model.device.type == "cuda"

    def reset(self) -> None:
        """Drop the bound passes of the previous rows."""
        self.kwargs = {**self.kwargs, cache_argument(self.model): self.kv.cache}
        self.programs.forget_states()
        self._inputs: dict[int, MovedInputs] = {}  # by width

    def make_room(self, tokens: int) -> None:
        """Move to longer memory if the next tokens do not fit; a cycle writes its widest pass at most."""
        self.reserve_slots(self.kv.filled + min(tokens, self.widths[-1]))

    def reserve_slots(self, needed: int) -> None:
        """Move to longer memory if there are fewer slots."""
        slots = slots_for(self.model, max(2 * self.kv.slots, needed)) if needed > self.kv.slots else 0
        if slots > self.kv.slots:
            self.kv.grow(slots)
            self.reset()

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, between two cycles; passes and cache become smaller."""
        self.kwargs = selected_inputs(self.kwargs, rows)
        self.kv.select(rows)
        self.reset()

    def should_shrink(self, tokens_left: int) -> bool:
        """Whether to continue a batch with its last running row alone."""
        # Only the cache and the inputs that `selected_inputs` knows may have rows. Strict text needs the batch's bits.
        others = [n for n, value in self.kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
        known = 1 in self.record.of(PromptRows) or tokens_left >= _WORTH_GRAPHS
        return known and not (others or self.is_strict) and self.kv.is_full

    @property
    def padding(self) -> int:
        """Ids at the beginning of the first row that its mask hides."""
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[0].all()):
            return 0
        return int(mask[0].int().argmax())

    def width_for(self, drafted: int) -> int:
        """Return the smallest verification width for a number of drafted tokens."""
        return self.widths[bisect_right(self.widths, drafted)]

    @property
    def longest_draft(self) -> int:
        """How many tokens can be drafted and verified in the free slots."""
        return self.widths[max(bisect_right(self.widths, self.kv.free_slots), 1) - 1] - 1

    def begin_drafts(self, ids_1S: Tensor) -> None:
        """Set the text that drafts continue."""
        self._vocab_blocks = VocabBlocks(self.vocabulary)
        self._vocab_blocks.add(ids_1S)

    def can_draft(self) -> bool:
        """Whether the twins are there; if they have just come, the next passes read them."""
        return self.programs.have_twins(self.kv)

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        """Run the last id through all twins, one slot further; return the next token's logits ``[B, V]``."""
        # Logits of tokens outside of the draft vocabulary are `MASKED_LOGIT`.
        return self.step(ids_BS, 1, 0, self._vocab_blocks)[:, -1]

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Run the last verified id and the `drafted` ids after it; return logits ``[B, drafted + 1, V]``."""
        if self._vocab_blocks is not None:
            self._vocab_blocks.add(ids_BS[:, -1 - drafted :])
        width = self.width_for(drafted)
        if width > drafted + 1:  # padding: copies of the last id, whose slots the next rewind frees
            ids_BS = torch.cat([ids_BS, ids_BS[:, -1:].expand(-1, width - drafted - 1)], dim=-1)
        logits = self.step(ids_BS, width)[:, : drafted + 1]
        self.keep_hidden(self._ran)
        return logits

    def step(
        self,
        ids_BS: Tensor,
        width: int = 1,
        depth: int | None = None,  # blocks to execute; None: the call's
        vocab_blocks: VocabBlocks | None = None,  # restricts the logits of the twins' head
    ) -> Tensor:
        """Run the last `width` ids and return their logits ``[B, width, V]``. Raises a CacheFullError."""
        moved = self._inputs.get(width)
        if moved is None:
            kept = self.kv.states.get((self.kv.rows, width))
            moved = self._inputs[width] = MovedInputs(self.model, width, {} if kept is None else kept.state.inputs)
        inputs = moved.update(self.kv.filled, ids_BS, functools.partial(self.prepare_inputs, ids_BS, width))
        depth = self.depth if depth is None else depth
        return self._run(inputs, width, depth, vocab_blocks, moved.owns(inputs))[:, -width:]

    def _run(
        self, inputs: Inputs, width: int, depth: int | None, vocab_blocks: VocabBlocks | None, owned: bool
    ) -> Tensor:
        """Run a pass by the state of its width, else through the model."""
        self._check_room(width)
        found = self.programs.states.get(width) or self.programs.find(inputs, width, self.kv, owned, depth)
        if isinstance(found, ModelRan):
            logits: Tensor = found.outputs.logits
        else:
            if not owned:
                values = dict(named_arguments(inputs))
                for name, tensor in found.inputs.items():
                    tensor.copy_(values[name])
            found.set_vocab_blocks(None if vocab_blocks is None else vocab_blocks.numbers)
            found.step(depth)
            logits = found.logits
        self._ran = found if self.keeps_hidden else None
        self.kv.filled += width
        return logits

    def run_once(self, inputs: Inputs, width: int, all_logits: bool = False) -> Tensor:
        """Run a part of a prompt; return its last or all logits ``[B, T, V]``. Raises a CacheFullError."""
        self._check_room(width)
        found = self.programs.find_once(inputs, self.kv, self.depth, last_token=not all_logits)
        if isinstance(found, StepState):
            found.step(self.depth)
        self.keep_hidden(found)
        self.kv.filled += width
        logits: Tensor = found.logits if isinstance(found, StepState) else found.outputs.logits
        return logits if all_logits else logits[:, -1:]

    @property
    def keeps_hidden(self) -> bool:
        """Whether a drafter reads the last hidden states."""
        return self.programs.keeps_hidden

    def keep_hidden(self, ran: StepState | ModelRan | None) -> None:
        """Keep the last hidden states of a pass that has run, if a drafter reads them."""
        hidden = ran.hidden() if isinstance(ran, StepState) else None if ran is None else ran.hidden
        if hidden is not None:
            self._hidden.append(hidden)

    def take_hidden(self) -> Tensor | None:
        """Return the last hidden states ``[B, T, D]`` of the ids that ran since the last call; None without any.

        They are those before the final norm, of the prompt and of verifying passes, padding included.
        """
        taken, self._hidden = self._hidden, []
        return torch.cat(taken, dim=1) if taken else None

    def hand_hidden_to(self, batch: Passes) -> None:
        """Hand the last hidden states of a prompt to passes that its only row continues in."""
        batch._hidden, self._hidden = self._hidden, []

    def _check_room(self, width: int) -> None:
        if self.kv.free_slots < width:
            raise CacheFullError.of(self.kv.slots, self.kv.filled, width)

    def release(self, text_BS: Tensor | None = None, prompt: int = 0) -> None:
        """Return the cache to the pool, with the text in it, `prompt` tokens of which are the prompt."""
        text_BS = text_BS if self._keeps_text else None
        state = None if self.state is None else self.state.of_entries
        self.record.of(PrefixPool).release(self.model, self.kv, text_BS, prompt, state)

    def write_programs(self) -> None:
        """Write new programs of an accelerated model to the compile cache."""
        programs = self.record.find(ProgramCache)
        if programs is not None:
            programs.write()

    def rewind(self, tokens: int) -> None:
        """Free the last entries of the cache."""
        self.kv.rewind(tokens)

    def kwargs_for(self, tokens: int) -> dict:
        """Return generate's model arguments for this many tokens."""
        return extended_inputs(self.model, self.kwargs, tokens - self.kwargs_tokens)

    def prepare_inputs(self, ids_BS: Tensor, width: int) -> Inputs:
        """Return the inputs of a pass over the last `width` ids, by transformers' methods."""
        kwargs = self.kwargs_for(self.kv.filled + width)
        return with_all_logits(self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=width, **kwargs))
