"""One call of generate: a model, its KV cache and the passes that run on them.

Within a call the model, its configuration, hooks and weights must not change; a change takes effect with the next call.
Not handled (an error says so if drafts are requested): models that keep more than keys and values, models that
River did not compile.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.compile_cache.codec import NotCacheable
from river_compile.compile_cache.programs import Bindable, ProgramCache, argument_kinds, named_arguments, with_sources
from river_compile.config import RiverConfig
from river_compile.decoding.draft_vocab import DraftVocab
from river_compile.decoding.inputs import (
    BY_SLOT,
    KNOWN,
    Inputs,
    MovedInputs,
    extended_inputs,
    joined_inputs,
    selected_inputs,
    with_all_logits,
    with_masks,
)
from river_compile.decoding.kv_cache import KVCache, slots_for, why_no_rewind
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.errors import ExactModeError
from river_compile.exits import forced_depth
from river_compile.kernels import MAX_EXACT_ROWS
from river_compile.kernels.native.load import few_rows
from river_compile.model_state import ModelState
from river_compile.progress import stage_shown
from river_compile.record import ModelRecord, record_of
from river_compile.runtime.executor import RiverExecutor, last_token_alone, on_call
from river_compile.runtime.state import StepState
from river_compile.runtime.stats import ExitStats
from river_compile.runtime.tensor_parallel import Ranks
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import OwnCall, current_stance, runs_one_graph
from river_compile.upstream.transformers import cache_argument, cache_of, mark_dynamic

log = logging.getLogger("river_compile.decoding")
# A graph that ran in this thread: its executor, its inputs and its outputs.
GraphCall = tuple[RiverExecutor, Sequence[Any], tuple]
_WORTH_GRAPHS = 200  # tokens of one row that pay for compiling its graphs, which takes as long as hundreds of passes
_LONGEST = 15  # default length of drafts
LONGEST_OFFLOADED = 63  # the same if a pass waits for offloaded weights, once for all of its tokens


def verification_widths(max_draft: int) -> tuple[int, ...]:
    """Return the query lengths of verifying passes: powers of two, 6, and max_draft + 1."""
    # Up to about six rows a pass waits for weights; eight cost a third more.
    widths = {2**i for i in range(max_draft.bit_length())} | ({6} if max_draft >= 6 else set())
    return (*sorted(widths), max_draft + 1)


class PromptRows(set[int]):
    """The numbers of rows that a model's prompts had so far."""


class _Bound(NamedTuple):
    """A state that a KV cache keeps for later calls, and the arguments of the forward that it was bound for."""

    state: StepState
    kinds: tuple[tuple[str, str], ...]  # by :func:`argument_kinds`


class Session:
    """The passes of one call of generate."""

    def __init__(
        self,
        model: PreTrainedModel,  # compiled or not
        kwargs: Mapping[str, Any],  # that generate prepared for the forward passes
        kv: KVCache,  # may hold the prompt's first tokens
        depth: int | None = None,  # backbone blocks of decode steps, `WHOLE` for all; None: by the exit policy
        state: ModelState | None = None,  # None: not known
        keeps_text: bool = False,  # whether the next call may reuse the text
    ) -> None:
        self.model, self.kv, self.depth = model, kv, depth
        self._kwargs = {**kwargs, cache_argument(model): kv.cache}
        self._kwargs_tokens = 0  # tokens of the masks and positions in them; 0 before the prompt
        self.record = record_of(model.parameters())
        self._own = self.record.find(OwnCall)  # None: the model is called as it is, compiled or not
        self._call = model if self._own is None else functools.partial(self._own, model)
        self._state, self._keeps_text = state, keeps_text
        programs = self.record.find(ProgramCache)  # None: passes cannot be cached
        begun = programs is not None and state is not None and programs.begin(model, state.identity)
        self._programs = programs if begun else None
        self.widths: tuple[int, ...] = (1,)  # query lengths of verifying passes, ascending
        self._graph: GraphRecord | None = None
        self._vocab: DraftVocab | None = None
        self._strict = False
        self._begun: set[RiverExecutor] = set()  # that have checked the weights
        packing = self.record.of(TwinWeights).packing
        self._packed = packing if packing is not None and packing.ended else None  # whose twins the passes may use
        self._reset_passes()

    def prefill(self, ids_BS: Tensor, config: GenerationConfig, all_logits: bool = False) -> Tensor:
        """Run the prompt ``[B, S]``, without tokens that the cache holds; return the last or all logits."""
        chunk = None if self._own is None else config.prefill_chunk_size
        if chunk is None or all_logits:
            return self._run_prompt(ids_BS, config, all_logits)
        while (logits := self.prefill_piece(ids_BS, config, chunk)) is None:
            pass
        return logits

    def prefill_piece(self, ids_BS: Tensor, config: GenerationConfig, tokens: int) -> Tensor | None:
        """Run the next `tokens` of a prompt through an accelerated model; return its last logits, None before."""
        whole, filled = ids_BS.shape[1], self.kv.filled
        # The last piece has at least `tokens`, so that it runs like a prompt and not like a few decode steps.
        upto = whole if whole - filled < 2 * tokens else filled + tokens
        if not self._kwargs_tokens:
            self._of_prompt = {
                name: self._kwargs[name] for name in BY_SLOT if isinstance(self._kwargs.get(name), Tensor)
            }
            self._cut_kwargs(upto)
            logits = self._run_prompt(ids_BS[:, :upto], config)
        else:
            self._cut_kwargs(upto)
            logits = self.step(ids_BS[:, :upto], upto - filled, last_token=True)[:, -1:]
        return logits if upto == whole else None

    def _cut_kwargs(self, tokens: int) -> None:
        """Use the prompt's masks and positions of its first tokens."""
        self._kwargs |= {name: value[..., :tokens] for name, value in self._of_prompt.items()}
        self._kwargs_tokens = tokens

    def _run_prompt(self, ids_BS: Tensor, config: GenerationConfig, all_logits: bool = False) -> Tensor:
        """Run the prompt in one pass; return the last or all logits."""
        model, record, kept = self.model, self.record, self.kv.filled
        inputs = self._rest_inputs(ids_BS) if kept else self._prompt_inputs(ids_BS, config)
        outputs: Any = {}
        with graph_calls() as calls:
            if inputs is not None:
                logits = self._pass(inputs, ids_BS.shape[1] - kept, self.depth, last_token=not all_logits)
            else:
                with forced_depth(self.depth):  # a prompt of one token is a decode step
                    outputs = self._run_any_prompt(ids_BS, config)
                logits = outputs.logits
        ran = self._begun.union(executor for executor, *_ in calls)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
        self._graph = next((graph for graph in record.of(Graphs) if graph.executor() in ran), None)
        self.stats, self.ranks = record.of(ExitStats), record.of(Ranks)
        if inputs is None:
            cache = cache_of(self._kwargs)
            assert cache is not None, "a generation without a cache is refused"
            if cache is self.kv.cache:
                self.kv.take_in()
            else:
                self.kv = KVCache(cache)
        self._reset_passes()
        self._kwargs_tokens = self.kv.filled + 1
        return logits if all_logits else logits[:, -1:]

    def _prompt_inputs(self, ids_BS: Tensor, config: GenerationConfig) -> Inputs | None:
        """Return the inputs of a prompt that runs like any other pass; None for others."""
        if self._own is None or not KNOWN.issuperset(self._kwargs):
            return None
        if not (self.kv.is_full and self.kv.memory_rows):  # allocating the cache is not in the graph
            return None
        return with_all_logits(with_masks(self.model, self._first_inputs(ids_BS, config)))

    def _first_inputs(self, ids_BS: Tensor, config: GenerationConfig) -> Inputs:
        first = not config.is_assistant
        inputs: Inputs = self.model.prepare_inputs_for_generation(ids_BS, is_first_iteration=first, **self._kwargs)
        return inputs

    def _run_any_prompt(self, ids_BS: Tensor, config: GenerationConfig) -> Any:
        """Return the model's outputs for any prompt."""
        if self._own is None:
            return self.model._prefill(ids_BS, config, self._kwargs, not config.is_assistant)
        return self._call_model(self._first_inputs(ids_BS, config))

    def _rest_inputs(self, ids_BS: Tensor) -> Inputs:
        """Return the inputs of a prompt's tokens that the cache lacks."""
        self._kwargs_tokens = ids_BS.shape[1]
        return self._prepare_inputs(ids_BS, ids_BS.shape[1] - self.kv.filled)

    def _call_model(self, inputs: Inputs) -> Any:
        """Call the model, through Dynamo if it is compiled."""
        mark_dynamic(inputs)
        return self._call(**inputs, return_dict=True)

    def allow_drafts(self, ids_BS: Tensor, logits_B1V: Tensor, max_draft: int | None, strict: bool) -> None:
        """Let one row draft, or raise an ExactModeError with the reason why it cannot."""
        graph = self._graph
        if graph is None:
            why_not = _why_not_rewritten(self.record)
            raise ExactModeError(f"Exact mode requires a model that backend='river' can rewrite: {why_not}")
        check_paths(graph.config)
        if max_draft is None:
            max_draft = _LONGEST if graph.config.offload is None else LONGEST_OFFLOADED
        widths = verification_widths(max_draft)
        if strict:
            widths = self._strict_widths(graph, widths)
        inputs = self._prepare_inputs(torch.cat([ids_BS, ids_BS.new_zeros(ids_BS.shape[0], 1)], dim=1), 1)
        given = inputs["input_ids"].shape[1]
        if given != 1:  # CPM-Ant, where every position attends to all others, later ones too
            raise ExactModeError(
                "Exact mode verifies several new tokens in one pass, and "
                f"{type(self.model).__name__} takes the whole text in every pass ({given} tokens instead of 1). Use "
                "quality='fast', whose output changes"
            )
        if not self.kv.is_full:
            raise ExactModeError(
                f"{why_no_rewind(self.model, self.kv.cache)}. Use quality='fast', whose output changes"
            )
        self.widths, self._strict = widths, strict
        self._vocabulary = logits_B1V.shape[-1]

    def begin_drafts(self, ids_1S: Tensor) -> None:
        """Set the text that drafts continue."""
        self._vocab = DraftVocab(self._vocabulary)
        self._vocab.add(ids_1S)

    def _strict_widths(self, graph: GraphRecord, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Return widths at which a row has the same bits as alone; raise an ExactModeError if none has."""
        program = graph.program
        assert program is not None, "the prompt ran in it"
        reason = program.width_matters
        if reason:
            raise ExactModeError(
                f"Cannot guarantee strict=True for this {type(self.model).__name__}: {reason}", id="RC063"
            )
        dtype = self.model.dtype
        most = {width: few_rows(dtype, width) if program.native else MAX_EXACT_ROWS for width in widths}
        return tuple(width for width in widths if width <= most[width])

    def _reset_passes(self) -> None:
        """Drop the passes of the previous rows."""
        self._kwargs = {**self._kwargs, cache_argument(self.model): self.kv.cache}
        self._states: dict[int, StepState | None] = {}  # by width; None: such passes go through the model
        self._inputs: dict[int, MovedInputs] = {}

    @property
    def runs_late(self) -> bool:
        """Whether calls on the model's device return before they have run."""
        return self.model.device.type == "cuda"

    def should_shrink(self, tokens_left: int) -> bool:
        """Whether to continue a batch with its last running row alone."""
        # Only the cache and the inputs that `selected_inputs` knows may have rows. Strict text needs the bits of the
        # batch.
        others = [n for n, value in self._kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
        known = 1 in self.record.of(PromptRows) or tokens_left >= _WORTH_GRAPHS
        return known and not (others or self._strict) and self.kv.is_full

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, between two cycles; passes and cache become smaller."""
        self._kwargs = selected_inputs(self._kwargs, rows)
        self.kv.select(rows)
        self._reset_passes()

    @classmethod
    def empty_batch(cls, prompt: Session, rows: int) -> Session:
        """Return a session without rows, for `rows` that join; model and depth as of `prompt`."""
        # Memory is allocated for all rows; passes see the first ones, which are in use.
        kv = prompt.kv.like(prompt.kv.slots, rows)
        kv.select([])
        session = cls(prompt.model, {}, kv, prompt.depth, prompt._state)
        session._graph = prompt._graph
        session.stats, session.ranks = prompt.stats, prompt.ranks
        return session

    def may_join(self, prompt: Session) -> bool:
        """Whether rows are in use, or the model is as it was when the batch began."""
        return bool(self.kv.rows) or (self._state is not None and self._state == prompt._state)

    def join(self, prompt: Session, ids_1S: Tensor) -> None:
        """Add the row of a session whose prompt has run as the last one, between two cycles."""
        entries = prompt.kv.filled
        kwargs = prompt._kwargs_for(entries + 1)
        if kwargs.get("attention_mask") is None:  # a text without padding, next to padded rows
            kwargs["attention_mask"] = ids_1S.new_ones(1, entries + 1)
        if self.kv.rows:
            kwargs = joined_inputs(self._kwargs_for(self.kv.filled + 1), kwargs)
            entries = max(entries, self.kv.filled)
        self._reserve_slots(entries + self.widths[-1])
        self.kv.join(prompt.kv)
        self._kwargs, self._kwargs_tokens = kwargs, self.kv.filled + 1
        self._reset_passes()

    def make_room(self, tokens: int) -> None:
        """Move to longer memory if the next tokens do not fit; a cycle writes its widest pass at most."""
        self._reserve_slots(self.kv.filled + min(tokens, self.widths[-1]))

    def _reserve_slots(self, needed: int) -> None:
        """Move to longer memory if there are fewer slots."""
        slots = slots_for(self.model, max(2 * self.kv.slots, needed)) if needed > self.kv.slots else 0
        if slots > self.kv.slots:
            self.kv.grow(slots)
            self._reset_passes()

    def width_for(self, drafted: int) -> int:
        """Return the smallest verification width for a number of drafted tokens."""
        return self.widths[bisect_right(self.widths, drafted)]

    @property
    def longest_draft(self) -> int:
        """How many tokens can be drafted and verified in the free slots."""
        return self.widths[max(bisect_right(self.widths, self.kv.free_slots), 1) - 1] - 1

    def can_draft(self) -> bool:
        """Whether the twins are there; if they have just come, the next passes read them."""
        twins = self.record.of(TwinWeights)
        if twins.packing is not self._packed and twins.packing is not None:
            if not twins.packing.ended:
                return False
            self._packed = twins.packing
            self._begun.clear()
            self._states.clear()
        # A program that was never built may begin to pack: a pass at full depth builds it.
        return not twins.background or 1 in self._states or (self.kv.rows, 1) in self.kv.states

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        """Run the last id through all twins, one slot further; return the next token's logits ``[B, V]``."""
        # Logits of tokens outside of the draft vocabulary are `MASKED_LOGIT`.
        return self.step(ids_BS, 1, 0, self._vocab)[:, -1]

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        """Run the last verified id and the `drafted` ids after it; return logits ``[B, drafted + 1, V]``."""
        if self._vocab is not None:
            self._vocab.add(ids_BS[:, -1 - drafted :])
        width = self.width_for(drafted)
        if width > drafted + 1:  # padding: copies of the last id, whose slots the next rewind frees
            ids_BS = torch.cat([ids_BS, ids_BS[:, -1:].expand(-1, width - drafted - 1)], dim=-1)
        return self.step(ids_BS, width)[:, : drafted + 1]

    def step(
        self,
        ids_BS: Tensor,
        width: int = 1,
        depth: int | None = None,  # blocks to execute; None: the session's
        vocab: DraftVocab | None = None,  # restricts the logits of the twins' head
        last_token: bool = False,  # whether only the last token's logits are read, and others may be missing
    ) -> Tensor:
        """Run the last `width` ids and return their logits ``[B, width, V]``. Raises a CacheFullError."""
        moved = self._inputs.get(width)
        if moved is None:
            kept = self._kept_state(width)
            moved = self._inputs[width] = MovedInputs(self.model, width, {} if kept is None else kept.state.inputs)
        inputs = moved.update(self.kv.filled, ids_BS, functools.partial(self._prepare_inputs, ids_BS, width))
        depth = self.depth if depth is None else depth
        return self._pass(inputs, width, depth, vocab, last_token)[:, -width:]

    def _pass(
        self,
        inputs: Inputs,
        width: int,
        depth: int | None,
        vocab: DraftVocab | None = None,
        last_token: bool = False,
    ) -> Tensor:
        """Run a pass by its bound program if known, else through the model."""
        if self.kv.slots - self.kv.filled < width:  # the model's graph raises the error
            state = None
        elif last_token:  # a pass that may not come again
            found = self._recall(inputs)
            state = None if found is None else found[0].bind(found[1], captured=False, last_token=True)
        else:
            state = self._states[width] if width in self._states else self._find_state(width, inputs)
        if state is None:
            logits = self._run_model(width, inputs, depth, last_token)
        else:
            if not last_token and not self._inputs[width].owns(inputs):
                values = dict(named_arguments(inputs))
                for name, tensor in state.inputs.items():
                    tensor.copy_(values[name])
            state.restrict_logits(None if vocab is None else vocab.blocks)
            state.step(depth)
            logits = state.logits
        self.kv.filled += width
        return logits

    def _find_state(self, width: int, inputs: Inputs) -> StepState | None:
        """Return a compatible state of the cache, or bind a program that was traced before."""
        kept = self._kept_state(width)
        if kept is not None and _is_compatible(kept, inputs, self._inputs[width].owns(inputs)):
            state = kept.state
            self._check_weights(state.executor, state.args)
            if state.compiled is state.executor.compiled:
                self._states[width] = state
                return state
        found = self._recall(inputs)
        return None if found is None else self._bind(width, *found, inputs)

    def _bind(self, width: int, executor: RiverExecutor, args: Sequence[Any], inputs: Inputs) -> StepState:
        """Bind a program to the cache; the state reads the inputs that are updated in place, or copies."""
        if not self._inputs[width].owns(inputs):
            given = {id(value) for _, value in named_arguments(inputs)}
            args = [arg.clone() if id(arg) in given and isinstance(arg, Tensor) else arg for arg in args]
        state = self._states[width] = executor.bind(args)
        self.kv.states[self.kv.rows, width] = _Bound(state, argument_kinds(inputs))
        return state

    def _kept_state(self, width: int) -> _Bound | None:
        """Return the state that an earlier call bound to the cache for passes of a width."""
        kept: _Bound | None = self.kv.states.get((self.kv.rows, width))
        return kept

    def _recall(self, inputs: Inputs) -> Bindable | None:
        """Return a program that was traced before, in this process or another one, and its inputs."""
        found = None if self._programs is None else self._programs.lookup(self.model, inputs, self.kv.cache)
        if found is not None:
            self._check_weights(*found)
        return found

    def _check_weights(self, executor: RiverExecutor, args: Sequence[Any]) -> None:
        """Have an executor check the model's weights, once in a session."""
        if executor not in self._begun:
            self._begun.add(executor)
            executor.begin(args, self._state)

    def _run_model(self, width: int, inputs: Inputs, depth: int | None, last_token: bool) -> Tensor:
        """Run a pass through the model; bind the first one of its kind."""
        known = width in self._states
        with (
            graph_calls() as calls,
            forced_depth(depth),
            last_token_alone(last_token),
            contextlib.nullcontext() if known else stage_shown("tracing"),
        ):
            logits: Tensor = self._call_model(inputs).logits
        if known or not self.kv.is_full:
            return logits
        graph = locate(self.model, self.record.of(Graphs), inputs, self.kv.cache, calls, logits, self._own)
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
        """Return the cache to the pool, with the text in it, `prompt` tokens of which are the prompt."""
        text_BS = text_BS if self._keeps_text else None
        state = None if self._state is None else self._state.of_entries
        self.record.of(PrefixPool).release(self.model, self.kv, text_BS, prompt, state)

    def write_programs(self) -> None:
        """Write new programs of an accelerated model to the compile cache."""
        programs = self.record.find(ProgramCache)
        if programs is not None:
            programs.write()

    def rewind(self, tokens: int) -> None:
        """Free the last entries of the cache."""
        self.kv.rewind(tokens)

    def _kwargs_for(self, tokens: int) -> dict:
        """Return generate's model arguments for this many tokens."""
        return extended_inputs(self.model, self._kwargs, tokens - self._kwargs_tokens)

    def _prepare_inputs(self, ids_BS: Tensor, width: int) -> Inputs:
        """Return the inputs of a pass over the last `width` ids, by transformers' methods."""
        kwargs = self._kwargs_for(self.kv.filled + width)
        return with_all_logits(self.model.prepare_inputs_for_generation(ids_BS, next_sequence_length=width, **kwargs))


def _is_compatible(kept: _Bound, inputs: Inputs, owned: bool) -> bool:
    """Whether a state may run with these inputs: the same arguments, which are its own or look like them."""
    # An argument that the state does not read is another program, as for the first call with it.
    if kept.kinds != argument_kinds(inputs):
        return False
    values = dict(named_arguments(inputs))
    pairs = [(tensor, values.get(name)) for name, tensor in kept.state.inputs.items()]
    if owned:
        return all(a is b for a, b in pairs)
    return all(isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)


def _why_not_rewritten(record: ModelRecord) -> str:
    """Return why a prompt ran in none of a model's rewritten graphs."""
    graphs = record.of(Graphs)
    if graphs.why_not:
        return f"it refused: {graphs.why_not}"
    if record.find(OwnCall) is not None:
        return f"Dynamo traced no graph of this call, with the stance {current_stance()!r}"
    reached = "this call did not reach it" if graphs else "this model never reached it"
    return f'{reached}. Call model.compile(backend="river")'


def check_paths(config: RiverConfig) -> None:
    """Raise an ExactModeError if a model was compiled without all twins or the whole backbone."""
    if config.prefill != "backbone":
        raise ExactModeError(
            f"prefill={config.prefill!r} is not available in exact mode, since prompts that exit cannot verify drafts. "
            "Use prefill='backbone'",
            id="RC062",
        )
    if config.exit_depth is not None:
        raise ExactModeError(
            f"Exact mode requires all layers and all twins, and exit_depth={config.exit_depth} compiles one path only. "
            "Remove exit_depth",
            id="RC062",
        )
    if config.offload is not None and config.offload_policy == "exit":
        raise ExactModeError(
            f"Exact mode verifies at full depth, and offload={config.offload} with offload_policy='exit' lets no token "
            "go that far. Use offload_policy='fetch', the default of accelerate",
            id="RC062",
        )


@contextlib.contextmanager
def graph_calls() -> Iterator[list[GraphCall]]:
    """Collect the calls of compiled graphs that this thread makes inside."""
    calls: list[GraphCall] = []
    here = threading.get_ident()

    def note(*call: Any) -> None:
        if threading.get_ident() == here:
            calls.append(call)

    with on_call(note):
        yield calls


def locate(
    model: PreTrainedModel,
    graphs: Sequence[GraphRecord],
    inputs: Mapping[str, Any],
    cache: Cache,
    calls: Sequence[GraphCall],
    logits: Tensor,
    own: OwnCall | None,
) -> GraphRecord | None:
    """Find the sources of a graph's inputs; return None if the call did more, or a source is unknown."""
    if len(calls) != 1:
        return None
    executor, args, outputs = calls[0]
    made = next((i for i, output in enumerate(outputs) if output is logits), None)
    if made is None or not runs_one_graph(model, executor.code, own):
        return None
    graph = next(graph for graph in graphs if graph.executor() is executor)
    assert graph.traced is not None, "Dynamo traced it in this process"
    try:
        executor.locate(with_sources(executor.program, graph.traced, model, args, inputs, cache, made))
    except NotCacheable as why:
        log.info("a pass goes through the model each time: %s", why)
        return None
    return graph
