"""The passes of one call of generate: so many ids at such a depth, on the call's KV cache.

Within a call the model, its configuration, hooks and weights must not change; a change takes effect with the next call.
Not handled: the prompt (`prompt.py`); which drafts are allowed (`admission.py`).
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
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.agreement import Agreement
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.compile_cache.codec import NotCacheable
from river_compile.compile_cache.programs import Bindable, ProgramCache, argument_kinds, named_arguments, with_sources
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
from river_compile.exits import forced_depth
from river_compile.model_state import ModelState
from river_compile.progress import stage_shown
from river_compile.record import record_of
from river_compile.runtime.executor import RiverExecutor, last_token_alone, on_call
from river_compile.runtime.state import StepState
from river_compile.runtime.stats import ExitStats
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import OwnCall, runs_one_graph
from river_compile.upstream.transformers import cache_argument, mark_dynamic

log = logging.getLogger("river_compile.decoding")
_WORTH_GRAPHS = 200  # tokens of one row that pay for compiling its graphs, which takes as long as hundreds of passes
# A graph that ran in this thread: its executor, its inputs and its outputs.
GraphCall = tuple[RiverExecutor, Sequence[Any], tuple]


class PromptRows(set[int]):
    """The numbers of rows that a model's prompts had so far."""


class _Bound(NamedTuple):
    """A state that a KV cache keeps for later calls, and the arguments of the forward that it was bound for."""

    state: StepState
    kinds: tuple[tuple[str, str], ...]  # by :func:`argument_kinds`


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
    ) -> None:
        self.model, self.kv, self.depth = model, kv, depth
        self.kwargs = {**kwargs, cache_argument(model): kv.cache}
        self.kwargs_tokens = 0  # tokens of the masks and positions in them; 0 before the prompt
        self.record = record_of(model.parameters())
        self.own = self.record.find(OwnCall)  # None: the model is called as it is, compiled or not
        self._call = model if self.own is None else functools.partial(self.own, model)
        self.state, self._keeps_text = state, keeps_text
        programs = self.record.find(ProgramCache)  # None: passes cannot be cached
        begun = programs is not None and state is not None and programs.begin(model, state.identity)
        self._programs = programs if begun else None
        self.widths: tuple[int, ...] = (1,)  # query lengths of verifying passes, ascending
        self.graph: GraphRecord | None = None  # that the prompt ran in
        self._vocab_blocks: VocabBlocks | None = None
        self.vocabulary = 0  # logits of a token
        self.is_strict = False
        self.begun: set[RiverExecutor] = set()  # that have checked the weights
        packing = self.record.of(TwinWeights).background.packing
        self._packed = packing if packing is not None and packing.ended else None  # whose twins the passes may use
        self.reset()

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
        self._states: dict[int, StepState | None] = {}  # by width; None: such passes go through the model
        self._inputs: dict[int, MovedInputs] = {}

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
        background = self.record.of(TwinWeights).background
        packing = background.packing
        if packing is not None and packing is not self._packed:
            if not packing.ended:
                return False
            self._packed = packing
            self.begun.clear()
            self._states.clear()
        # A program that was never built may begin to pack: a pass at full depth builds it.
        return not background.enabled or 1 in self._states or (self.kv.rows, 1) in self.kv.states

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
        return self.step(ids_BS, width)[:, : drafted + 1]

    def step(
        self,
        ids_BS: Tensor,
        width: int = 1,
        depth: int | None = None,  # blocks to execute; None: the session's
        vocab_blocks: VocabBlocks | None = None,  # restricts the logits of the twins' head
        last_token: bool = False,  # whether only the last token's logits are read, and others may be missing
    ) -> Tensor:
        """Run the last `width` ids and return their logits ``[B, width, V]``. Raises a CacheFullError."""
        moved = self._inputs.get(width)
        if moved is None:
            kept = self._kept_state(width)
            moved = self._inputs[width] = MovedInputs(self.model, width, {} if kept is None else kept.state.inputs)
        inputs = moved.update(self.kv.filled, ids_BS, functools.partial(self.prepare_inputs, ids_BS, width))
        depth = self.depth if depth is None else depth
        return self.run(inputs, width, depth, vocab_blocks, last_token)[:, -width:]

    def run(
        self,
        inputs: Inputs,
        width: int,
        depth: int | None,
        vocab_blocks: VocabBlocks | None = None,
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
            state.set_vocab_blocks(None if vocab_blocks is None else vocab_blocks.numbers)
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
        if executor not in self.begun:
            self.begun.add(executor)
            executor.begin(args, self.state)

    def _run_model(self, width: int, inputs: Inputs, depth: int | None, last_token: bool) -> Tensor:
        """Run a pass through the model; bind the first one of its kind."""
        known = width in self._states
        with (
            graph_calls() as calls,
            forced_depth(depth),
            last_token_alone(last_token),
            contextlib.nullcontext() if known else stage_shown("tracing"),
        ):
            logits: Tensor = self.call_model(inputs).logits
        if known or not self.kv.is_full:
            return logits
        graph = locate(self.model, self.record.of(Graphs), inputs, self.kv.cache, calls, logits, self.own)
        if graph is not None and graph.traced is not None:
            executor, args, _ = calls[0]
            self.begun.add(executor)
            if self._programs is not None:
                self._programs.insert(inputs, self.kv.cache, executor, graph.traced)
            if not last_token and width in self._inputs:
                self._bind(width, executor, args, inputs)
        elif not last_token:
            self._states[width] = None
        return logits

    def call_model(self, inputs: Inputs) -> Any:
        """Call the model, through Dynamo if it is compiled."""
        mark_dynamic(inputs)
        return self._call(**inputs, return_dict=True)

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
