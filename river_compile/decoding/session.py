"""One call of generate: a model, its KV cache, and the passes that run on them.

    session = Session(model, kwargs, KVCache.of(model, slots=512), depth=WHOLE)
    logits = session.prefill(ids, config)             # through the model, and so through Dynamo and all its guards
    logits = session.step(ids)                        # the last id
    session.rewind(1)                                 # and its entries are gone
    logits = session.step(ids, width=4)               # the last four at once

The first pass of each width goes through the model. From then on its graph is known, and runs again with other ids,
masks and positions (`runtime/state.py`, `inputs.py`). Inputs are prepared by transformers' own methods, so masks and
positions are those of plain generation.

The contract: within one call of generate nobody changes the model, its configuration, its hooks or its weights. A
change takes effect with the next call.

Not handled (refused with the reason, where drafts are asked for): models that keep more than keys and values, and those
whose forward passes the river backend did not rewrite.
"""

from __future__ import annotations

import contextlib
import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from river_compile.compile_cache.programs import Bindable, named_arguments
from river_compile.config import RiverConfig
from river_compile.decoding.inputs import (
    BY_SLOT,
    KNOWN,
    Inputs,
    MovedInputs,
    joined_inputs,
    selected_inputs,
    with_all_logits,
    with_masks,
)
from river_compile.decoding.traced_calls import graph_calls, locate
from river_compile.errors import ExactModeError
from river_compile.exits import forced_depth
from river_compile.kernels.native.load import few_rows
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS
from river_compile.model_record import GraphRecord, record_of
from river_compile.model_state import ModelState
from river_compile.progress import stage_shown
from river_compile.runtime.draft_vocab import DraftVocab
from river_compile.runtime.executor import RiverExecutor, last_token_alone
from river_compile.runtime.kv_cache import KVCache, slots_for
from river_compile.runtime.state import StepState
from river_compile.upstream.transformers import cache_argument, cache_of, mark_dynamic

_WORTH_GRAPHS = 200  # tokens of one row
_LONGEST = 15  # tokens of a draft, where the caller does not say
LONGEST_OFFLOADED = 63  # where a pass waits for weights to come in, once for all of its tokens


def verification_widths(max_draft: int) -> tuple[int, ...]:
    """Returns the query lengths at which the backbone verifies: powers of two, the last one max_draft + 1."""
    return (*(2**i for i in range(max_draft.bit_length())), max_draft + 1)


class Session:
    """The passes of one call of generate.

    Args:
        model: the model, compiled or not.
        kwargs: what generate prepared for the forward passes.
        kv: the cache that they use, perhaps with entries of the prompt's first tokens.
        depth: blocks of the backbone that its decode steps execute, `WHOLE` for all; None leaves it to the exit policy.
        state: of the model; None where that is not known.
        keeps_text: whether the text stays in the cache for the next call.

    Attributes:
        widths: query lengths at which the backbone may verify drafts, ascending from 1.
        record: of the model.
        kv: as above.
        stats, ranks: what counts the model's cycles, and the ranks that share it, from :meth:`prefill` on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kwargs: Mapping[str, Any],
        kv: KVCache,
        depth: int | None = None,
        state: ModelState | None = None,
        keeps_text: bool = False,
    ) -> None:
        self.model, self.kv, self.depth = model, kv, depth
        self._kwargs = {**kwargs, cache_argument(model): kv.cache}
        self._in_kwargs = 0  # tokens that masks and positions are of
        self.record = record_of(model.parameters())
        self._call = model if self.record.call is None else functools.partial(self.record.call, model)
        self._state, self._keeps_text = state, keeps_text
        # None: passes cannot be cached.
        self._programs = self.record.known_programs(model, state)
        self.widths: tuple[int, ...] = (1,)
        self._graph: GraphRecord | None = None
        self._tokens: DraftVocab | None = None
        self._strict = False
        self._begun: set[RiverExecutor] = set()  # that have looked at the weights
        self._use_rows()

    def prefill(self, ids_BS: Tensor, config: GenerationConfig, all_logits: bool = False) -> Tensor:
        """Runs the prompt ``[B, S]`` and returns its logits: of the last position, or of all that the model gives.

        Of a prompt that begins with what is in the cache only the rest runs.
        """
        model, record, kept = self.model, self.record, self.kv.filled
        inputs = self._rest_of_prompt(ids_BS) if kept else self._prompt_inputs(ids_BS, config)
        outputs: Any = {}
        with graph_calls() as calls:
            if inputs is not None:
                logits = self._pass(inputs, ids_BS.shape[1] - kept, self.depth, last_token=not all_logits)
            else:
                with forced_depth(self.depth):  # (a prompt of one token is a decode step)
                    outputs = self._prompted(ids_BS, config)
                logits = outputs.logits
        ran = self._begun.union(executor for executor, *_ in calls)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
        self._graph = next((graph for graph in record.graphs if graph.executor() in ran), None)
        self.stats, self.ranks = record.exit_stats, record.ranks
        if inputs is None:
            cache = cache_of(self._kwargs)
            assert cache is not None, "a generation without a cache is refused"
            if cache is self.kv.cache:
                self.kv.take_in()
            else:
                self.kv = KVCache(cache)
        self._use_rows()
        self._in_kwargs = self.kv.filled + 1
        return logits if all_logits else logits[:, -1:]

    def prefill_piece(self, ids_BS: Tensor, config: GenerationConfig, tokens: int) -> Tensor | None:
        """Runs the next `tokens` of a prompt of one row, or all that are left if these are less than twice as many.

        Returns:
            The last logits ``[1, 1, V]``, None while there are more.
        """
        whole, filled = ids_BS.shape[1], self.kv.filled
        # (The last piece is as wide as to run like a prompt, and not like a few decode steps.)
        upto = whole if whole - filled < 2 * tokens else filled + tokens
        if not self._in_kwargs:
            cut = {
                name: self._kwargs[name][..., :upto] for name in BY_SLOT if isinstance(self._kwargs.get(name), Tensor)
            }
            self._kwargs |= cut
            logits = self.prefill(ids_BS[:, :upto], config)
        else:
            logits = self.step(ids_BS[:, :upto], upto - filled, last_token=True)[:, -1:]
        return logits if upto == whole else None

    def _prompt_inputs(self, ids_BS: Tensor, config: GenerationConfig) -> Inputs | None:
        """Returns what the model is given for a prompt that is a pass like others; None for any other."""
        if self.record.call is None or config.prefill_chunk_size is not None or not KNOWN.issuperset(self._kwargs):
            return None
        if not (self.kv.is_full and self.kv.memory_rows):  # (one that allocates the cache does more than its graph)
            return None
        return with_all_logits(with_masks(self.model, self._first_inputs(ids_BS, config)))

    def _first_inputs(self, ids_BS: Tensor, config: GenerationConfig) -> Inputs:
        first = not config.is_assistant
        inputs: Inputs = self.model.prepare_inputs_for_generation(ids_BS, is_first_iteration=first, **self._kwargs)
        return inputs

    def _prompted(self, ids_BS: Tensor, config: GenerationConfig) -> Any:
        """Returns the model's outputs for any prompt."""
        if self.record.call is None or config.prefill_chunk_size is not None:
            return self.model._prefill(ids_BS, config, self._kwargs, not config.is_assistant)
        return self._called(self._first_inputs(ids_BS, config))

    def _rest_of_prompt(self, ids_BS: Tensor) -> Inputs:
        """Returns what the model is given for the last tokens of a prompt, the others of which are in the cache."""
        self._in_kwargs = ids_BS.shape[1]
        return self._prepared(ids_BS, ids_BS.shape[1] - self.kv.filled)

    def _called(self, inputs: Inputs) -> Any:
        """Returns the outputs of the model, through Dynamo if it is compiled."""
        mark_dynamic(inputs)
        return self._call(**inputs, return_dict=True)

    def allow_drafts(self, ids_BS: Tensor, logits_B1V: Tensor, max_draft: int | None, strict: bool) -> None:
        """Makes drafts possible where one row runs, which the backbone verifies.

        Args:
            ids_BS: the prompt.
            logits_B1V: of its last position.
            max_draft: longest draft; None for 15, and 63 where blocks of the backbone are offloaded.
            strict: whether every row must have the bits that it has without drafts.

        Raises:
            ExactModeError: the cache cannot be rewound, the river backend did not rewrite the model, or rows of a pass
                of several tokens have other bits than alone.
        """
        graph = self._graph
        if graph is None:
            raise ExactModeError(f"exact mode needs a model that the river backend can rewrite: {self.record.why_not}")
        check_paths(graph.config)
        if max_draft is None:
            max_draft = _LONGEST if graph.config.offload is None else LONGEST_OFFLOADED
        widths = verification_widths(max_draft)
        if strict:
            widths = self._strict_widths(graph, widths)
        inputs = self._prepared(torch.cat([ids_BS, ids_BS.new_zeros(ids_BS.shape[0], 1)], dim=1), 1)
        given = inputs["input_ids"].shape[1]
        if given != 1:  # (CPM-Ant, where every position attends to all others, those that follow too)
            raise ExactModeError(
                "exact mode verifies several tokens in one pass over what is new, and "
                f"{type(self.model).__name__} takes the whole text in every pass ({given} tokens in place of 1); leave "
                "out custom_generate"
            )
        if not self.kv.is_full:
            kinds = {type(layer).__name__ for layer in self.kv.cache.layers}
            raise ExactModeError(
                "exact mode rewinds the KV cache after every draft, and the layers of this one cannot give entries "
                f"back ({', '.join(sorted(kinds))}); it works with attention layers"
            )
        self.widths, self._strict = widths, strict
        self._vocabulary = logits_B1V.shape[-1]

    def begin_drafts(self, ids_1S: Tensor) -> None:
        """Drafts go on with a text from here on."""
        self._tokens = DraftVocab(self._vocabulary)
        self._tokens.add(ids_1S)

    def _strict_widths(self, graph: GraphRecord, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the widths at which a row has the same bits as alone.

        Raises:
            ExactModeError: there is none.
        """
        program = graph.program
        assert program is not None, "the prompt ran in it"
        reason = program.width_matters
        if reason:
            raise ExactModeError(f"strict=True cannot be kept for this {type(self.model).__name__}: {reason}")
        dtype = self.model.dtype
        most = {width: few_rows(dtype, width) if program.native else MAX_EXACT_ROWS for width in widths}
        return tuple(width for width in widths if width <= most[width])

    def _use_rows(self) -> None:
        """Goes on with the rows of the cache that are in use."""
        self._kwargs = {**self._kwargs, cache_argument(self.model): self.kv.cache}
        self._states: dict[int, StepState | None] = {}  # by width; None: such passes go through the model
        self._inputs: dict[int, MovedInputs] = {}

    @property
    def runs_late(self) -> bool:
        """Whether calls on the model's device have run when they return."""
        return self.model.device.type == "cuda"

    def should_shrink(self, tokens_left: int) -> bool:
        """Whether a batch goes on with its last row alone, which then has so many tokens to generate at most.

        Nothing but the cache and what `selected_inputs` knows may have a row for each. Graphs of one row are compiled
        once, which may take as long as hundreds of passes. Strict text has the bits of a batch that stays.
        """
        others = [n for n, value in self._kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
        known = 1 in self.record.batch_sizes or tokens_left >= _WORTH_GRAPHS
        return known and not (others or self._strict) and self.kv.is_full

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone, between two cycles: passes and cache become smaller."""
        self._kwargs = selected_inputs(self._kwargs, rows)
        self.kv.select(rows)
        self._use_rows()

    @classmethod
    def of_rows(cls, prompt: Session, rows: int) -> Session:
        """Returns a session without rows, up to `rows` of which may join; model and depth are those of one whose prompt
        has run. Memory is allocated for all rows at once, and passes see the first of its rows: those in use."""
        kv = prompt.kv.like(prompt.kv.slots, rows)
        kv.select([])
        session = cls(prompt.model, {}, kv, prompt.depth, prompt._state)
        session._graph = prompt._graph
        session.stats, session.ranks = prompt.stats, prompt.ranks
        return session

    def may_join(self, prompt: Session) -> bool:
        """Whether the model is as it was when the passes became known; nobody changes it under rows."""
        return bool(self.kv.rows) or (self._state is not None and self._state == prompt._state)

    def join(self, prompt: Session, ids_1S: Tensor) -> None:
        """Takes in the row of a session whose prompt has run, between two cycles: it becomes the last one."""
        entries = prompt.kv.filled
        kwargs = prompt._lengthened(entries + 1)
        if kwargs.get("attention_mask") is None:  # (of a text without padding, which rows beside it will have)
            kwargs["attention_mask"] = ids_1S.new_ones(1, entries + 1)
        if self.kv.rows:
            kwargs = joined_inputs(self._lengthened(self.kv.filled + 1), kwargs)
            entries = max(entries, self.kv.filled)
        self._fit(entries + self.widths[-1])
        self.kv.join(prompt.kv)
        self._kwargs, self._in_kwargs = kwargs, self.kv.filled + 1
        self._use_rows()

    def make_room(self, tokens: int) -> None:
        """Moves to longer memory, between two cycles, where the next `tokens` do not fit; no cycle writes more than its
        widest pass."""
        self._fit(self.kv.filled + min(tokens, self.widths[-1]))

    def _fit(self, needed: int) -> None:
        """Moves to longer memory where there are fewer slots."""
        slots = slots_for(self.model, max(2 * self.kv.slots, needed)) if needed > self.kv.slots else 0
        if slots > self.kv.slots:
            self.kv.grow(slots)
            self._use_rows()

    def width_for(self, drafted: int) -> int:
        """Returns the smallest verification width for a number of drafted tokens."""
        return self.widths[bisect_right(self.widths, drafted)]

    @property
    def longest_draft(self) -> int:
        """How many tokens can be drafted and verified in the slots that the cache has left."""
        return self.widths[max(bisect_right(self.widths, self.kv.free_slots), 1) - 1] - 1

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
        moved = self._inputs.get(width)
        if moved is None:
            state = self.kv.states.get((self.kv.rows, width))
            moved = self._inputs[width] = MovedInputs(self.model, width, {} if state is None else state.inputs)
        inputs = moved.at(self.kv.filled, ids_BS, functools.partial(self._prepared, ids_BS, width))
        depth = self.depth if depth is None else depth
        return self._pass(inputs, width, depth, tokens, last_token)[:, -width:]

    def _pass(
        self,
        inputs: Inputs,
        width: int,
        depth: int | None,
        tokens: DraftVocab | None = None,
        last_token: bool = False,
    ) -> Tensor:
        """Runs a pass of some width: by its program where that is known, else through the model."""
        if self.kv.slots - self.kv.filled < width:  # (the model's graph tells the user)
            state = None
        elif last_token:  # (a pass that need not come again)
            found = self._recalled(inputs)
            state = None if found is None else found[0].bind(found[1], captured=False, last_token=True)
        else:
            state = self._states[width] if width in self._states else self._find_state(width, inputs)
        if state is None:
            logits = self._through_model(width, inputs, depth, last_token)
        else:
            if not last_token and not self._inputs[width].owns(inputs):
                values = dict(named_arguments(inputs))
                for name, held in state.inputs.items():
                    held.copy_(values[name])
            state.only_logits(None if tokens is None else tokens.blocks)
            state.step(depth)
            logits = state.logits
        self.kv.filled += width
        return logits

    def _find_state(self, width: int, inputs: Inputs) -> StepState | None:
        """Looks for what is bound to the cache already, then for a program that was traced before."""
        state = self.kv.states.get((self.kv.rows, width))
        if state is not None and _serves(state, inputs, self._inputs[width].owns(inputs)):
            self._begin(state.executor, state.args)
            if state.compiled is state.executor.compiled:
                self._states[width] = state
                return state
        found = self._recalled(inputs)
        return None if found is None else self._bind(width, *found, inputs)

    def _bind(self, width: int, executor: RiverExecutor, args: Sequence[Any], inputs: Inputs) -> StepState:
        """Binds a program to the cache; the state's inputs are those that are moved on in place, or copies."""
        if not self._inputs[width].owns(inputs):
            given = {id(value) for _, value in named_arguments(inputs)}
            args = [arg.clone() if id(arg) in given and isinstance(arg, Tensor) else arg for arg in args]
        state = self._states[width] = self.kv.states[self.kv.rows, width] = executor.bind(args)
        return state

    def _recalled(self, inputs: Inputs) -> Bindable | None:
        """Returns a pass that was traced before, in this process or another one."""
        found = None if self._programs is None else self._programs.lookup(self.model, inputs, self.kv.cache)
        if found is not None:
            self._begin(*found)
        return found

    def _begin(self, executor: RiverExecutor, args: Sequence[Any]) -> None:
        """Has an executor look at the model's weights, once in a session."""
        if executor not in self._begun:
            self._begun.add(executor)
            executor.begin(args, self._state)

    def _through_model(self, width: int, inputs: Inputs, depth: int | None, last_token: bool) -> Tensor:
        """Runs a pass through the model; binds the first one of its kind."""
        known = width in self._states
        with (
            graph_calls() as calls,
            forced_depth(depth),
            last_token_alone(last_token),
            contextlib.nullcontext() if known else stage_shown("tracing"),
        ):
            logits: Tensor = self._called(inputs).logits
        if known or not self.kv.is_full:
            return logits
        graph = locate(self.model, self.record.graphs, inputs, self.kv.cache, calls, logits, self.record.call)
        if graph is not None and graph.traced is not None:
            executor, args, _ = calls[0]
            self._begun.add(executor)
            if self._programs is not None:
                self._programs.insert(inputs, self.kv.cache, executor, graph.traced)
            if not last_token and width in self._inputs:
                self._bind(width, executor, args, inputs)
        elif not last_token:
            self._states[width] = None
        return logits

    def release(self, text_BS: Tensor | None = None, prompt: int = 0) -> None:
        """Leaves the cache to the next call, with the text whose entries are in it, `prompt` of them the prompt's."""
        text_BS = text_BS if self._keeps_text else None
        state = None if self._state is None else self._state.of_entries
        self.record.prefixes.release(self.model, self.kv, text_BS, prompt, state)

    def rewind(self, tokens: int) -> None:
        """Frees the last entries of the cache."""
        self.kv.rewind(tokens)

    def _lengthened(self, tokens: int) -> dict:
        """Returns a forward's arguments, as `generate` keeps them, for so many tokens."""
        kwargs, more = dict(self._kwargs), tokens - self._in_kwargs
        return self.model._update_model_kwargs_for_generation({}, kwargs, num_new_tokens=more) if more else kwargs

    def _prepared(self, ids_BS: Tensor, width: int) -> Inputs:
        """Makes the model kwargs of a pass over the last `width` ids, by transformers' methods."""
        kwargs = self._lengthened(self.kv.filled + width)
        return with_all_logits(self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=width, **kwargs))


def _serves(state: StepState, inputs: Inputs, owned: bool) -> bool:
    """Whether a state may run with these inputs of another session: they are its own, or look as those do."""
    values = dict(named_arguments(inputs))
    pairs = [(held, values.get(name)) for name, held in state.inputs.items()]
    if owned:
        return all(a is b for a, b in pairs)
    return all(isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)


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
