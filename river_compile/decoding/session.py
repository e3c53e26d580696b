"""One call of generate: a model, its KV cache, and the passes that run on them.

    session = Session(model, borrowed, depth=WHOLE)
    logits = session.prefill(ids, config)             # through the model, and so through Dynamo and all its guards
    logits = session.step(ids)                        # the last id
    session.rewind(1)                                 # and its entries are gone
    logits = session.step(ids, width=4)               # the last four at once

The first pass of each width goes through the model. From then on its graph is known, and runs again with other ids,
masks and positions (`bound.py`, `inputs.py`). Inputs are prepared by transformers' own methods, so masks and positions
are those of plain generation.

The contract: within one call of generate nobody changes the model, its configuration, its hooks or its weights. A
change takes effect with the next call.

Not handled (refused with the reason, where drafts are asked for): caches that cannot be rewound, and models whose
forward passes the river backend did not rewrite.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.config import RiverConfig
from river_compile.decoding.bound_pass import BoundPass, graph_calls, locate
from river_compile.decoding.inputs import KNOWN, Inputs, PassInputs, with_all_logits, with_masks
from river_compile.decoding.late import read
from river_compile.decoding.rewind import BY_SLOT, RewindableCache, moved_inputs, selected_inputs
from river_compile.errors import ExactModeError, RiverWarning
from river_compile.exits import forced_depth
from river_compile.kernels.native.load import few_rows
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS
from river_compile.model_record import GraphRecord, record_of
from river_compile.model_state import ModelLook
from river_compile.progress import stage_shown
from river_compile.runtime.cache_pool import BorrowedCache
from river_compile.runtime.draft_stats import PassTimes
from river_compile.runtime.draft_vocab import DraftVocab
from river_compile.runtime.executor import RiverExecutor, last_token_alone
from river_compile.store.programs import Programs
from river_compile.upstream.transformers import (
    cache_argument,
    cache_of,
    is_allocated,
    is_static,
    with_rows,
)

_LONGEST = 15  # tokens of a draft, where the caller does not say
LONGEST_OFFLOADED = 63  # where a pass waits for weights to come in, once for all of its tokens


def verification_widths(max_draft: int) -> tuple[int, ...]:
    """Returns the query lengths at which the backbone verifies: powers of two, the last one max_draft + 1."""
    return (*(2**i for i in range(max_draft.bit_length())), max_draft + 1)


class Session:
    """The passes of one call of generate.

    Args:
        model: the model, compiled or not.
        lent: what generate prepared for the forward passes, with the cache that they use.
        depth: blocks of the backbone that its decode steps execute, `WHOLE` for all; None leaves it to the exit policy.
        look: at the model, of this call; None for one of its own.

    Attributes:
        widths: query lengths at which the backbone may verify drafts, ascending from 1.
        record: of the model.
        cache, stats, sequences, times, ranks: the KV cache, what counts the model's cycles, what tells its sequences
            apart, how long its passes take, and the ranks that share it, from :meth:`prefill` on.
    """

    cache: Cache
    entries: RewindableCache
    times: PassTimes

    def __init__(
        self, model: PreTrainedModel, lent: BorrowedCache, depth: int | None = None, look: ModelLook | None = None
    ) -> None:
        self.model, self.lent, self.depth = model, lent, depth
        self.record = record_of(model.parameters())
        self._look = look or self.record.look_at(model)
        self.widths: tuple[int, ...] = (1,)
        self._graph: GraphRecord | None = None
        self._tokens: DraftVocab | None = None
        self._begun: set[RiverExecutor] = set()  # that have looked at the weights
        self._strict = False
        self._programs: Programs | None = None  # those stored; None where passes cannot be
        self._began: tuple[float, int] | None = None  # the prompt: at what time, and how many graphs there were
        self._rows = 0

    def prefill(self, ids_BS: Tensor, config: GenerationConfig, all_logits: bool = False) -> Tensor:
        """Runs the prompt ``[B, S]`` and returns its logits: of the last position, or of all that the model gives.

        Of a prompt that begins with what is in the cache only the rest runs.
        """
        model, kwargs, record, new = self.model, self.lent.kwargs, self.record, ids_BS.shape[1] - self.lent.filled
        self._began = time.perf_counter(), record.prepared
        inputs = self._rest_of_prompt(ids_BS, new) if self.lent.filled else self._prompt_inputs(ids_BS, config)
        outputs: Any = {}
        with graph_calls() as calls:
            if inputs is None:
                with forced_depth(self.depth):  # (a prompt of one token is a decode step)
                    outputs = model._prefill(ids_BS, config, kwargs, not config.is_assistant)
                logits = outputs.logits
            else:
                self._use(cache_of(inputs))
                begins = not self.lent.filled
                logits = self._pass(inputs, new, self.depth, prompt=begins, last_token=not all_logits)
        ran = [executor for executor, *_ in calls]
        self._kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        self._graph = next((graph for graph in record.graphs if graph.executor() in ran), None)
        self.stats, self.ranks = record.exit_stats, record.ranks
        self._use(cache_of(self._kwargs))
        self._of_rows(ids_BS.shape[0])
        self._kept = self._kept_by_kwargs = self.entries.filled + 1
        return logits if all_logits else logits[:, -1:]

    def prefill_piece(self, ids_BS: Tensor, config: GenerationConfig, tokens: int) -> Tensor | None:
        """Runs the next `tokens` of a prompt of one row, or all that are left if these are less than twice as many.

        Returns:
            The last logits ``[1, 1, V]``, None while there are more.
        """
        whole, filled = ids_BS.shape[1], self.entries.filled if self._rows else self.lent.filled
        # (The last piece is as wide as to run like a prompt, and not like a few decode steps.)
        upto = whole if whole - filled < 2 * tokens else filled + tokens
        if not self._rows:
            kwargs = self.lent.kwargs
            cut = {name: kwargs[name][..., :upto] for name in BY_SLOT if isinstance(kwargs.get(name), Tensor)}
            self.lent.kwargs = {**kwargs, **cut}
            logits = self.prefill(ids_BS[:, :upto], config)
        else:
            logits = self.step(ids_BS[:, :upto], upto - filled, last_token=True)[:, -1:]
            self._kept = upto + 1
        return logits if upto == whole else None

    @contextlib.contextmanager
    def told_if_compiled(self, rows: int) -> Iterator[None]:
        """Warns, once for a model, if its body waits for graphs since no batch of so many rows has run before."""
        record, start = self.record, time.perf_counter()
        graphs, others = len(record.graphs), record.drafts.times.keys() - {rows}
        yield
        if others and len(record.graphs) > graphs and not record.told_of_batches:
            record.told_of_batches = True
            warnings.warn(
                f"a prompt of {rows} rows was compiled anew, in {time.perf_counter() - start:.0f} s, and its steps are "
                "next; later batches of two rows and more, of any size, run in the same graphs",
                RiverWarning,
                stacklevel=6,
            )

    def _prompt_inputs(self, ids_BS: Tensor, config: GenerationConfig) -> Inputs | None:
        """Returns what the model is given for a prompt that is a pass like others; None where transformers runs it."""
        kwargs, cache = self.lent.kwargs, cache_of(self.lent.kwargs)
        if cache is None or config.prefill_chunk_size is not None or not KNOWN.issuperset(kwargs):
            return None
        if not is_static(cache) or not is_allocated(cache) or cache.get_seq_length():
            return None  # (a prompt that allocates the cache does more than its graph)
        self._programs = self.record.known_programs(self.model, self._look)
        if self._programs is None:
            return None
        inputs: Inputs = self.model.prepare_inputs_for_generation(
            ids_BS, is_first_iteration=not config.is_assistant, **kwargs
        )
        return with_all_logits(with_masks(self.model, inputs))

    def _rest_of_prompt(self, ids_BS: Tensor, width: int) -> Inputs:
        """Returns what the model is given for the last tokens of a prompt, the others of which are in the cache."""
        self._programs = self.record.known_programs(self.model, self._look)
        self._use(cache_of(self.lent.kwargs))
        self._kwargs, self._kept_by_kwargs = self.lent.kwargs, ids_BS.shape[1]
        return self._prepared(ids_BS, width)

    def allow_drafts(self, ids_BS: Tensor, logits_B1V: Tensor, max_draft: int | None, strict: bool) -> None:
        """Makes drafts possible, which the backbone verifies.

        Args:
            ids_BS: the prompt.
            logits_B1V: of its last position.
            max_draft: longest draft; None for 15, and 63 where blocks of the backbone are offloaded.
            strict: whether every row must have the bits that it has without drafts.

        Raises:
            ExactModeError: the cache cannot be rewound, the river backend did not rewrite the model, or rows of a pass
                of several tokens have other bits than alone.
        """
        self._note_prompt(ids_BS.shape[1] - self.lent.filled, logits_B1V)
        graph = self._graph
        if graph is None:
            raise ExactModeError(f"exact mode needs a model that the river backend can rewrite: {self.record.why_not}")
        check_paths(graph.config)
        if max_draft is None:
            max_draft = _LONGEST if graph.config.offload is None else LONGEST_OFFLOADED
        widths = verification_widths(max_draft)
        self.entries.allow_rewinds(widths[-1], strict)
        if strict:
            widths = self._strict_widths(graph, widths, ids_BS.shape[0])
        inputs = self._prepared(torch.cat([ids_BS, ids_BS.new_zeros(ids_BS.shape[0], 1)], dim=1), 1)
        given = inputs["input_ids"].shape[1]
        if given != 1:  # (CPM-Ant, where every position attends to all others, those that follow too)
            raise ExactModeError(
                "exact mode verifies several tokens in one pass over what is new, and "
                f"{type(self.model).__name__} takes the whole text in every pass ({given} tokens in place of 1); leave "
                "out custom_generate"
            )
        self.widths, self._strict = widths, strict
        self._tokens = DraftVocab(logits_B1V.shape[-1])
        self._tokens.add(ids_BS)

    def _note_prompt(self, width: int, logits_B1V: Tensor) -> None:
        """Takes in how long the prompt took, unless something was prepared for it: it bounds what wide passes take."""
        if self._began is None:
            return
        read(logits_B1V[:, -1, 0])  # (it has run)
        began, prepared = self._began
        seconds, made = self.ranks.agree([time.perf_counter() - began, self.record.prepared - prepared])
        if not made:
            self.times.note_prompt(width, seconds)

    def _strict_widths(self, graph: GraphRecord, widths: tuple[int, ...], rows: int) -> tuple[int, ...]:
        """Returns the widths at which a row has the same bits as alone.

        Raises:
            ExactModeError: there is none.
        """
        program = graph.program
        assert program is not None, "the prompt ran in it"
        reason = program.width_matters
        if not reason and self.entries.grows:
            reason = 'its KV cache grows; leave cache_implementation out, or use cache_implementation="static"'
        if reason:
            raise ExactModeError(f"strict=True cannot be kept for this {type(self.model).__name__}: {reason}")
        dtype = self.model.dtype
        most = {width: few_rows(dtype, width) if program.native else MAX_EXACT_ROWS for width in widths}
        return tuple(width for width in widths if width == 1 or width * rows <= most[width])

    def _use(self, cache: Cache | None) -> None:
        """Goes on with a cache, of which no pass is known."""
        assert cache is not None, "a generation without a cache is refused"
        self._bound_of: dict[int, dict[tuple, BoundPass | None]] = {}  # passes by rows
        self._see(cache)

    def _see(self, cache: Cache) -> None:
        """Goes on with a cache whose memory passes may be known of, with other rows than before."""
        self.cache = cache
        self.entries = RewindableCache(cache)
        if self.widths[-1] > 1:
            self.entries.allow_rewinds(self.widths[-1], self._strict)
        self._bound: dict[tuple, BoundPass | None] = {}
        self._inputs: dict[int, PassInputs] = {}

    def _of_rows(self, rows: int) -> None:
        self._rows = rows
        self._bound = self._bound_of.setdefault(rows, {})
        record = self.record
        self.times = record.drafts.times_of(rows, lambda: record.prepared)

    @property
    def runs_late(self) -> bool:
        """Whether calls on the model's device have run when they return."""
        return self.model.device.type == "cuda"

    @property
    def can_take_back(self) -> bool:
        """Whether one more token's entries can be freed again without being asked for beforehand."""
        return self.entries.filled < self.entries.in_place

    @property
    def can_part(self) -> bool:
        """Whether rows may keep different numbers of tokens: all state by slot can be moved with them.

        A model without position ids may count slots, padding among them.
        """
        mask, positions = (self._kwargs.get(name) for name in ("attention_mask", "position_ids"))
        if self._tokens is None or not (isinstance(mask, Tensor) and isinstance(positions, Tensor) and mask.ndim == 2):
            return False
        return positions.shape[-2:-1] == mask.shape[:1] and self.entries.can_part

    def pays_to_select(self, rows: int, tokens: int) -> bool:
        """Whether rows may leave, and the others, `rows`, then generate so many tokens at most in less time.

        Nothing but the cache and what `selected_inputs` knows may have a row for each. Graphs for a batch of another
        size are compiled once, which may take as long as hundreds of passes.
        """
        others = [n for n, value in self._kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
        if others or not self.can_part:
            return False
        known = self.record.drafts.times.get(rows)
        saved = tokens * self.times.of(1) * (1 - rows / self._rows)
        return (known is not None and known.measured) or saved > self.times.preparing

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone, between two cycles: passes and cache become smaller."""
        cache = with_rows(self.cache, rows)
        self._kwargs = {**selected_inputs(self._kwargs, rows), cache_argument(self.model): cache}
        if self.entries.stays:
            self._see(cache)
        else:
            self._use(cache)
        self._of_rows(len(rows))

    def make_room(self, tokens: int) -> None:
        """Moves to a longer cache, between two cycles, where the next `tokens` do not fit and a cache that grows was
        asked for; no cycle writes more than its widest pass."""
        longer = self.lent.longer(self.cache, self.entries.filled, min(tokens, self.widths[-1]))
        if longer is not None:
            self._move_to(longer)

    def _move_to(self, cache: Cache) -> None:
        self._use(cache)
        self._kwargs = {**self._kwargs, cache_argument(self.model): cache}

    def width_for(self, drafted: int) -> int:
        """Returns the smallest verification width for a number of drafted tokens."""
        return self.widths[bisect_right(self.widths, drafted)]

    @property
    def longest_draft(self) -> int:
        """How many tokens can be drafted and verified in the slots that the cache has left."""
        return self.widths[max(bisect_right(self.widths, self.entries.room), 1) - 1] - 1

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        """Runs the last id through the whole river, one slot further; returns the next token's logits ``[B, V]``.

        Of a token that is rare and not in the text, they may be `UNWANTED`.
        """
        return self.step(ids_BS, 1, 0, self._tokens)[:, -1]

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Runs the last verified id and the `drafted` ids after it at the session's depth.

        Returns:
            The logits ``[B, drafted + 1, V]``. The pass is as wide as one of the fixed widths: copies of the last id
            fill it up, whose logits are dropped and whose slots the next rewind frees.
        """
        if self._tokens is not None:
            self._tokens.add(ids_BS[:, -1 - drafted :])
        width = self.width_for(drafted)
        if width > drafted + 1:
            ids_BS = torch.cat([ids_BS, ids_BS[:, -1:].expand(-1, width - drafted - 1)], dim=-1)
        return self.step(ids_BS, width)[:, : drafted + 1]

    def step(
        self,
        ids_BS: Tensor,
        width: int = 1,
        depth: int | None = None,
        tokens: DraftVocab | None = None,
        last_token: bool = False,
    ) -> Tensor:
        """Runs the last `width` ids, the first of which has no entry yet, and returns their logits ``[B, width, V]``.

        Args:
            ids_BS: all ids so far.
            width: how many of them run.
            depth: blocks to execute; None for the session's.
            tokens: those whose logits the river's head computes, None for all.
            last_token: nobody reads other logits than the last token's, and there may be no others.

        Raises:
            CacheFullError: (a ``ValueError``) they do not fit into a static cache.
        """
        if width not in self._inputs:
            self._inputs[width] = PassInputs(self.model, width)
        filled = self.entries.filled
        inputs = self._inputs[width].at(filled, ids_BS, functools.partial(self._prepared, ids_BS, width))
        depth = self.depth if depth is None else depth
        return self._pass(inputs, width, depth, tokens, last_token=last_token)[:, -width:]

    def _pass(
        self,
        inputs: Inputs,
        width: int,
        depth: int | None,
        tokens: DraftVocab | None = None,
        prompt: bool = False,
        last_token: bool = False,
    ) -> Tensor:
        """Runs a pass of some width: again, where one of its kind is known, else through the model."""
        key = (width, prompt)
        if self.entries.lacks_room(width):  # (the model's graph tells the user)
            logits = self._through_model(key, inputs, depth, last_token)
        elif prompt or last_token:
            logits = self._once(key, inputs, depth, last_token)
        else:
            logits = self._again(key, inputs, depth, tokens)
        self.entries.filled += width
        return logits

    def _again(self, key: tuple, inputs: Inputs, depth: int | None, tokens: DraftVocab | None) -> Tensor:
        """Runs a pass whose width comes again; it is bound to the cache the first time."""
        width, _ = key
        if key not in self._bound:
            found = None if self._programs is None else self._programs.recall(self.model, key[1:], inputs, self.cache)
            if found is None:
                return self._through_model(key, inputs, depth, False)
            self._bound[key] = self._bind(found.executor, found.args, inputs, width)
        bound = self._bound[key]
        if bound is None:
            return self._through_model(key, inputs, depth, False)
        return bound(inputs, depth, None if tokens is None else tokens.blocks)

    def _bind(self, executor: RiverExecutor, args: Sequence[Any], inputs: Inputs, width: int) -> BoundPass:
        self._begin_with(executor, args)
        return BoundPass(executor, args, inputs, self._inputs[width].owns(inputs))

    def _once(self, key: tuple, inputs: Inputs, depth: int | None, last_token: bool) -> Tensor:
        """Runs a pass of a width that need not come again, a prompt or what is left of one."""
        found = None if self._programs is None else self._programs.recall(self.model, key[1:], inputs, self.cache)
        if found is None:
            return self._through_model(key, inputs, depth, last_token)
        self._begin_with(found.executor, found.args)
        state = found.executor.bind(found.args, captured=False, last_token=last_token)
        found.executor.step(state, depth)
        return state.logits

    def _begin_with(self, executor: RiverExecutor, args: Sequence[Any]) -> None:
        """Has an executor look at the model's weights, once in a session."""
        if executor not in self._begun:
            self._begun.add(executor)
            executor.on_begin(args)

    def _through_model(self, key: tuple, inputs: Inputs, depth: int | None, last_token: bool) -> Tensor:
        """Runs a pass through the model; binds the first one of its kind."""
        width, tracing = key[0], contextlib.nullcontext() if key in self._bound else stage_shown("tracing")
        with graph_calls() as calls, forced_depth(depth), last_token_alone(last_token), tracing:
            logits: Tensor = self.model(**inputs, return_dict=True).logits
        if key in self._bound:
            return logits
        graph = locate(self.model, self.record.graphs, inputs, self.cache, calls, logits)
        bound: BoundPass | None = None
        if graph is not None:
            executor, args, _ = calls[0]
            if self._programs is not None and graph.traced is not None:
                self._programs.keep(key[1:], inputs, self.cache, executor, graph.traced)
            if width in self._inputs and not key[1]:
                bound = self._bind(executor, args, inputs, width)
        if not key[1]:
            self._bound[key] = bound
        return logits

    def rewind(self, slots: int) -> None:
        """Frees the last slots of the cache."""
        self.entries.rewind(slots)

    def keep(self, kept: Sequence[int], advance: int) -> None:
        """Ends a cycle: all slots but those of kept tokens are freed.

        The last kept token of a row has no slot yet, as in plain generation.

        Args:
            kept: tokens that each row kept.
            advance: by how many tokens the cache grows (or shrinks, where the longest row has ended). Rows that kept
                other numbers are moved so that all end in its last slot.
        """
        if set(kept) == {advance}:
            self._kept += advance
            if self._tokens is None:  # (nothing was drafted)
                return
            self.rewind(self.entries.filled - (self._kept - 1))
        else:
            most = max(kept)
            shifts = [most - count for count in kept]
            self._kwargs = moved_inputs(self._lengthened(self._kept + most), shifts, most - advance)
            freed = [self.entries.filled - (self._kept - 1) - count for count in kept]
            self._kept += advance
            self._kept_by_kwargs = self._kept
            self.entries.part(freed, self._kept - 1)
            self._inputs.clear()
        self.entries.mark()

    def _lengthened(self, tokens: int) -> dict:
        """Returns a forward's arguments, as `generate` keeps them, for so many tokens."""
        kwargs, more = dict(self._kwargs), tokens - self._kept_by_kwargs
        return self.model._update_model_kwargs_for_generation({}, kwargs, num_new_tokens=more) if more else kwargs

    def _prepared(self, ids_BS: Tensor, width: int) -> Inputs:
        """Makes the model kwargs of a pass over the last `width` ids, by transformers' methods."""
        kwargs = self._lengthened(self.entries.filled + width)
        return with_all_logits(self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=width, **kwargs))


def check_paths(config: RiverConfig) -> None:
    """Raises an ExactModeError if a model was compiled without its whole river or its whole backbone."""
    if config.prefill != "backbone":
        raise ExactModeError(
            f"prefill={config.prefill!r} lets prompts leave the backbone, so nothing could verify the drafts; compile "
            'the model with prefill="backbone"'
        )
    if config.exit_depth is not None:
        raise ExactModeError(
            f"exit_depth={config.exit_depth} leaves only one path in the compiled model; exact mode needs the whole "
            "river and the whole backbone: compile it without exit_depth"
        )
    if config.offload is not None and config.offload_policy == "exit":
        raise ExactModeError(
            f"offload={config.offload} with offload_policy='exit' makes every token leave by that depth; exact mode "
            "verifies with the whole backbone: compile the model with offload_policy='fetch'"
        )
