"""Runs a compiled model's draft steps and verifications on one KV cache.

Inputs are prepared by transformers' own methods, so masks and positions are those of plain generation.

A strict runner verifies in passes in which a token has the same bits at every width: through a batch-invariant copy of
the graph, compiled with the option ``same_rows``, or where the backbone runs on the C++ kernels, whose sums depend on
no other row, through the model's own graph at as many rows as they compute themselves. The first time that it uses a
width it runs the same tokens one by one too and compares logits and cache to the bit; a width that fails is reported in
a warning and not used.

Not handled (refused with the reason): caches that cannot be rewound, encoder-decoder models, and models whose forward
passes the river backend did not rewrite. Hooks on the model itself are not called by strict verification.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.cudagraphs.device import CaptureLog
from river_compile.distributed.ranks import Ranks
from river_compile.errors import ExactModeError, RiverWarning
from river_compile.exits import WHOLE, forced_depth
from river_compile.kept_cache import LentCache
from river_compile.kernels.native.load import few_rows
from river_compile.runtime.executor import on_step
from river_compile.runtime.pass_inputs import Inputs, PassInputs
from river_compile.runtime.sequences import Sequences
from river_compile.runtime.stats import ExitStats
from river_compile.runtime.wanted_logits import DraftTokens, only_logits_of
from river_compile.state import GraphRecord, ModelState
from river_compile.upstream.hf_cache import cache_argument, cache_of, with_rows

from .draft import RatesOfModel
from .graphs import BatchInvariantGraph, BatchInvariantGraphs
from .rates import PassTimes
from .refusals import check_paths, known, why_not
from .rewind import BY_SLOT, RewindableCache, moved_inputs, selected_inputs, tensors_of

_LONGEST = 15  # tokens of a draft, where the caller does not say
_LONGEST_OFFLOADED = 63  # where a pass waits for weights to come in, once for all of its tokens


def verification_widths(max_draft: int, strict: bool = False) -> tuple[int, ...]:
    """Returns the query lengths at which the backbone verifies.

    Powers of two, the last one max_draft + 1; every length up to it for strict verification, where each row costs.
    """
    if strict:
        return tuple(range(1, max_draft + 2))
    return (*(2**i for i in range(max_draft.bit_length())), max_draft + 1)


class _TimesByBatch(dict[tuple[int, bool], PassTimes]):
    """How long one model's passes take, by rows and whether they are strict."""


def preparations(state: ModelState) -> int:
    """Returns how many graphs of a model were compiled and captured so far."""
    return sum(1 + graph.of(CaptureLog).made for graph in state.graphs)


class DraftVerifyRunner:
    """The forward passes of one call of generate.

    Args:
        model: the compiled model.
        lent: what generate prepared for the forward passes, with the cache that they use.
        max_draft: longest draft; None for 15, and 63 where blocks of the backbone are offloaded.
        strict: whether verification must give the bits of one token per pass.

    Attributes:
        widths: query lengths at which the backbone may verify, ascending from 1.
        cache, stats, sequences, times, ranks, rates: the KV cache, what counts the model's cycles, what tells its
            sequences apart, how long its passes take, the ranks that share it, and how often its drafts held, from
            :meth:`prefill` on.
    """

    cache: Cache
    stats: ExitStats
    sequences: Sequences
    times: PassTimes
    ranks: Ranks
    rates: RatesOfModel

    def __init__(self, model: PreTrainedModel, lent: LentCache, max_draft: int | None, strict: bool = False) -> None:
        self.model = model
        self.lent, self.model_kwargs = lent, lent.kwargs
        self._max_draft, self._strict = max_draft, strict
        self.widths = self._widths = verification_widths(max_draft or _LONGEST_OFFLOADED, strict)
        self._invariant: BatchInvariantGraph | None = None  # None: the model's own
        self._verdicts: dict[tuple[object, ...], bool] = {}  # of strict passes, for this batch and cache

    def prefill(self, ids_BS: Tensor, config: GenerationConfig) -> Tensor:
        """Runs the prompt and returns the logits ``[B, 1, V]`` of its last position.

        Raises:
            ExactModeError: the cache cannot be rewound, or the river backend did not rewrite the model. The prompt has
                run by then (`prompt_logits`), so generation can go on without drafts.
        """
        steps: list[tuple[object, int]] = []
        notes = on_step(lambda executor, args, step: steps.append((executor, step.thread)))
        with notes, forced_depth(WHOLE):  # (a prompt of one token, or the rest of one, is a decode step)
            outputs = self.model._prefill(ids_BS, config, self.model_kwargs, not config.is_assistant)
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)
        cache = cache_of(self.model_kwargs)
        assert cache is not None, "exact mode refuses a generation without a cache"
        self.prompt_logits, self.cache = outputs.logits[:, -1:], cache
        state = known(self.model)
        ran = [executor for executor, thread in steps if thread == threading.get_ident()]
        graph = next((g for g in state.graphs if g.executor() in ran), None)
        if graph is None:
            raise ExactModeError(f"exact mode needs a model that the river backend can rewrite: {why_not(state)}")
        check_paths(graph.config)
        if self._max_draft is None:
            longest = _LONGEST if graph.config.offload is None else _LONGEST_OFFLOADED
            self.widths = self._widths = verification_widths(longest, self._strict)
        self._take(cache)
        self.stats, self.sequences, self.ranks = state.of(ExitStats), state.of(Sequences), state.of(Ranks)
        self.rates = state.of(RatesOfModel)
        self._prepare = functools.partial(self._be_ready, state, graph)
        self._prepare(ids_BS.shape[0])
        self._kept = self._entries.filled + 1
        self._tokens = DraftTokens(self.prompt_logits.shape[-1])
        self._tokens.add(ids_BS)
        self._prepared(torch.cat([ids_BS, ids_BS.new_zeros(ids_BS.shape[0], 1)], dim=1), 1)
        return self.prompt_logits

    def _take(self, cache: Cache) -> None:
        self.cache = cache
        self._entries = RewindableCache(cache, self._widths[-1])
        self._inputs = PassInputs(self.model)

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone, between two cycles: passes and cache become smaller."""
        self.model_kwargs = selected_inputs(self.model_kwargs, rows)
        self._move_to(with_rows(self.cache, rows))
        self._prepare(len(rows))

    def make_room(self, tokens: int) -> None:
        """Moves to a longer cache, between two cycles, where the next `tokens` do not fit and a cache that grows was
        asked for; no cycle writes more than its widest pass."""
        longer = self.lent.longer(self.cache, self._entries.filled, min(tokens, self._widths[-1]))
        if longer is not None:
            self._move_to(longer)
            self._prepare(self._batch)

    def _move_to(self, cache: Cache) -> None:
        self._take(cache)
        self.model_kwargs = {**self.model_kwargs, cache_argument(self.model): cache}

    @property
    def _can_select(self) -> bool:
        """Whether rows may leave: nothing but the cache and what `selected_inputs` knows has a row for each."""
        others = [n for n, value in self.model_kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
        # (The sums of a library depend on how many rows there are.)
        return self.can_part and not others and not (self._strict and self._batch > few_rows(self.model.dtype))

    def pays_to_select(self, rows: int, tokens: int) -> bool:
        """Whether rows may leave, and the others, `rows`, then generate so many tokens at most in less time.

        Graphs for a batch of another size are compiled once, which may take as long as hundreds of passes.
        """
        if not self._can_select:
            return False
        known = self._all_times.get((rows, self._strict))
        saved = tokens * self.times.of(1) * (1 - rows / self._batch)
        return (known is not None and known.measured) or saved > self.times.preparing

    def _be_ready(self, state: ModelState, graph: GraphRecord, batch: int) -> None:
        """Finds what is known of passes of this many rows, and the graph and the widths of strict ones."""
        self._batch, self._own_backbone = batch, graph.own_backbone
        prepared = functools.partial(preparations, state)
        self._all_times = state.of(_TimesByBatch)
        self.times = self._all_times.setdefault((batch, self._strict), PassTimes(prepared))
        if not self._strict:
            return
        graphs, key = state.of(BatchInvariantGraphs), (graph.config, graph.mode)
        if graph.own_backbone:
            self.widths = tuple(w for w in self._widths if w == 1 or w * batch <= few_rows(self.model.dtype, w))
        else:
            key = (dataclasses.replace(graph.config, same_rows=True), graph.mode)
            if key not in graphs:
                graphs[key] = BatchInvariantGraph(self.model, *key)
            self._invariant = graphs[key]
        self._verdicts = graphs.verdicts[key, batch, self._entries.capacity]

    def width_for(self, drafted: int) -> int:
        """Returns the smallest verification width for a number of drafted tokens."""
        return next(w for w in (*self._usable, *self.widths) if w > drafted)

    @property
    def longest_draft(self) -> int:
        """How many tokens can be drafted and verified in the slots that the cache has left."""
        return max((w for w in self._usable if w <= self._entries.room), default=1) - 1

    @property
    def _usable(self) -> list[int]:
        """The widths without those that were found to give other bits than strict verification allows."""
        return [w for w in self.widths if self._verdicts.get(self._case(w), True)]

    def _case(self, width: int) -> tuple[object, ...]:
        """Returns what decides whether a pass has the bits of narrow ones: its width, and which windows are full."""
        return (width, self._entries.phase(width))

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        """Runs the last id through the whole river, one slot further; returns the next token's logits ``[B, V]``.

        Of a token that is rare and not in the text, they may be `UNWANTED`.
        """
        with forced_depth(0), only_logits_of(self._tokens):
            return self._forward(ids_BS, 1)[:, -1]

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Runs the last verified id and the `drafted` ids after it through the backbone.

        Returns:
            The logits ``[B, drafted + 1, V]``. The pass is as wide as one of the fixed widths: copies of the last id
            fill it up, whose logits are dropped and whose slots the next rewind frees.
        """
        self._tokens.add(ids_BS[:, -1 - drafted :])
        width = self.width_for(drafted)
        filler = width - drafted - 1
        if filler:
            ids_BS = torch.cat([ids_BS, ids_BS[:, -1:].expand(-1, filler)], dim=-1)
        with forced_depth(WHOLE):  # (a pass of width 1 is a decode step)
            if self._strict and width > 1 and self._case(width) not in self._verdicts:
                return self._try_out(self._invariant, ids_BS, width)[:, : drafted + 1]
            return self._forward(ids_BS, width, self._invariant if width > 1 else None)[:, : drafted + 1]

    def _try_out(self, graph: BatchInvariantGraph | None, ids_BS: Tensor, width: int) -> Tensor:
        """Runs the last ids at once and one by one, notes whether the bits agree, and returns the latter's logits."""
        case = self._case(width)
        wide, wide_entries = self._forward(ids_BS, width, graph), self._copies()
        self.rewind(width)
        ends = range(ids_BS.shape[1] - width + 1, ids_BS.shape[1] + 1)
        narrow = torch.cat([self._forward(ids_BS[:, :end], 1) for end in ends], dim=1)
        same = torch.equal(wide, narrow) and all(map(torch.equal, wide_entries, self._copies()))
        same = self.ranks.every(same)
        self._verdicts[case] = same
        if not same:
            warnings.warn(
                f"strict=True: in {type(self.model).__name__} a pass of {width} tokens rounds differently from one of "
                "a single token, so no draft is verified at that width; the text stays exact but comes slower",
                RiverWarning,
                stacklevel=2,
            )
        return narrow

    def _copies(self) -> list[Tensor]:
        """Returns copies of what every layer of the cache holds."""
        return [held[name].clone() for layer in self.cache.layers for held, name in tensors_of(layer)]

    def rewind(self, slots: int) -> None:
        """Frees the last slots of the cache."""
        self._entries.rewind(slots)

    @property
    def can_part(self) -> bool:
        """Whether rows may keep other numbers of tokens: what else the model reads by slot can be moved with them.

        A model without position ids may count slots, padding among them. In strict passes the sums of attention must
        not depend on the slot, as those of the C++ kernels over a static cache do not.
        """
        mask, positions = (self.model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
        if not (isinstance(mask, Tensor) and isinstance(positions, Tensor) and mask.ndim == 2):
            return False
        by_slot = self._strict and (self._entries.grows or not self._own_backbone)
        return positions.shape[-2:-1] == mask.shape[:1] and not by_slot and self._entries.can_part

    def keep(self, kept: Sequence[int], advance: int) -> None:
        """Ends a cycle: masks and positions grow, all slots but those of kept tokens are freed.

        The last kept token of a row has no slot yet, as in plain generation.

        Args:
            kept: tokens that each row kept.
            advance: by how many tokens the cache grows (or shrinks, where the longest row has ended). Rows that kept
                other numbers are moved so that all end in its last slot.
        """
        if set(kept) == {advance}:
            self.model_kwargs = self._lengthened(advance)
            self._kept += advance
            self.rewind(self._entries.filled - (self._kept - 1))
        else:
            most = max(kept)
            shifts = [most - count for count in kept]
            self.model_kwargs = moved_inputs(self._lengthened(most), shifts, most - advance)
            freed = [self._entries.filled - (self._kept - 1) - count for count in kept]
            self._kept += advance
            self._entries.part(freed, self._kept - 1)
            self._inputs = PassInputs(self.model)
        self._entries.mark()

    def _lengthened(self, tokens: int) -> dict:
        if not tokens:
            return dict(self.model_kwargs)
        return self.model._update_model_kwargs_for_generation({}, dict(self.model_kwargs), num_new_tokens=tokens)

    def _forward(self, ids_BS: Tensor, width: int, graph: BatchInvariantGraph | None = None) -> Tensor:
        """Runs the last `width` ids, the first of which has no entry yet, and returns their logits.

        They run through `graph` where it is given, else through the model's own.
        """
        prepare = functools.partial(self._prepared, ids_BS, width)
        inputs = self._inputs.of(ids_BS, width, self._entries.filled, prepare)
        if graph is not None:
            logits = graph(self.model, **inputs, return_dict=True).logits
        else:
            logits = self.model(**inputs, return_dict=True).logits
        self._entries.filled += width
        return logits

    def _prepared(self, ids_BS: Tensor, width: int) -> Inputs:
        """Makes what a pass over the last `width` ids takes; raises an ExactModeError where it takes more."""
        kwargs = self._lengthened(self._entries.filled + width - self._kept)
        if width > 1 and "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = 0  # all of them; any other number would be a graph of its own
        inputs = self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=width, **kwargs)
        given = inputs["input_ids"].shape[1]
        if given != width:  # (CPM-Ant, where every position attends to all others, those that follow too)
            name = type(self.model).__name__
            raise ExactModeError(
                f"exact mode verifies several tokens in one pass over what is new, and {name} takes the whole text in "
                f"every pass ({given} tokens in place of {width}); leave out custom_generate"
            )
        return inputs
