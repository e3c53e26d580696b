"""The programs of one call's passes, bound to its KV cache: kept from an earlier call, or bound by the first pass.

Not handled: how a program is found (`tracing/program_for.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from river_compile.backend import river
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.decoding.inputs import Inputs
from river_compile.decoding.kv_cache import KVCache
from river_compile.exits import forced_depth
from river_compile.model_state import ModelState
from river_compile.record import ModelRecord
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.state import StepState
from river_compile.tracing.forward import Forward
from river_compile.tracing.program_for import Bindable, ModelRan, program_for, run_model
from river_compile.tracing.programs import ProgramCache
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import OwnCall, compiled_with
from river_compile.upstream.transformers import mark_dynamic


class _Kept(NamedTuple):
    """A state that a KV cache keeps for later calls, and the arguments of the forward that it was bound for."""

    state: StepState
    kinds: tuple[tuple[str, str], ...]  # as `Forward` has them
    shapes: dict[Any, Any]

    def fits(self, forward: Forward, owned: bool) -> bool:
        """Whether the state may run a pass with these arguments, which are its own tensors if they are `owned`."""
        # An argument that the state does not read is another program, as for the first call with it.
        if (self.kinds, self.shapes) != (forward.kinds, forward.shapes):
            return False
        given = dict(forward.arguments)
        return not owned or all(tensor is given.get(name) for name, tensor in self.state.inputs.items())


class BoundPrograms:
    """Finds the states that run one call's passes, and calls the model for passes that have none."""

    def __init__(
        self, model: PreTrainedModel, record: ModelRecord, state: ModelState | None, keeps_hidden: bool
    ) -> None:
        self._model, self._record, self._state = model, record, state
        self.keeps_hidden = keeps_hidden  # whether the last hidden states of passes are wanted
        own = record.find(OwnCall)  # None: the model is called as it is, compiled or not
        self._call = model if own is None else functools.partial(own, model)
        # Graphs of a model whose submodules are compiled stand for no call of it.
        self._has_programs = own is not None or compiled_with(river, model._compiled_call_impl)
        programs = record.find(ProgramCache)
        begun = programs is not None and state is not None and programs.begin(model, state.identity)
        self._programs = programs if begun else None
        self.graph: GraphRecord | None = None  # that the call's first pass ran in
        self._checked: set[RiverExecutor] = set()  # whose weights were checked in this call
        self._packed = record.of(TwinWeights).background.usable  # whose twins the passes may use
        self.forget_states()

    def forget_states(self) -> None:
        """Drop the states, after a change of the rows or of the KV cache."""
        self.states: dict[int, StepState] = {}  # by width
        self._without: set[int] = set()  # widths of passes that no program stands for

    def have_twins(self, kv: KVCache) -> bool:
        """Whether the twins are there; if they have just come, the next passes bind programs with them."""
        background = self._record.of(TwinWeights).background
        packing = background.packing
        if packing is not None:
            packing.check()
            if not packing.usable:
                return False
            if packing is not self._packed:
                self._packed = packing
                self._checked.clear()
                self.states.clear()
        # A program that was never built may begin to pack: a pass at full depth builds it.
        has_run = 1 in self.states or 1 in self._without or (kv.rows, 1) in kv.states
        return has_run or not background.enabled

    def find(self, inputs: Inputs, width: int, kv: KVCache, owned: bool, depth: int | None) -> StepState | ModelRan:
        """Return the state for the passes of a width; if no program stands for them, run this one through the model.

        `owned`: the tensors among the inputs are updated in place for later passes; else the state gets copies.
        """
        if width in self._without:
            return ModelRan(self.call_model(inputs, depth), None)
        found = self._kept_or_bound(inputs, width, kv, owned, depth)
        if isinstance(found, StepState):
            self.states[width] = found
        else:
            self._without.add(width)
        return found

    def _kept_or_bound(
        self, inputs: Inputs, width: int, kv: KVCache, owned: bool, depth: int | None
    ) -> StepState | ModelRan:
        kept: _Kept | None = kv.states.get((kv.rows, width))
        forward = Forward(self._model, inputs, kv.cache)
        if kept is not None and kept.fits(forward, owned) and kept.state.keeps_hidden >= self.keeps_hidden:
            executor = kept.state.executor
            self._check_weights(Bindable(executor, kept.state.args))
            if kept.state.compiled is executor.compiled:
                return kept.state
        found = self._program_for(forward, kv, depth)
        if isinstance(found, ModelRan):
            return found
        executor, args = found
        if not owned:
            given = {id(value) for _, value in forward.arguments}
            args = [arg.clone() if id(arg) in given and isinstance(arg, Tensor) else arg for arg in args]
        state = executor.bind(args, keeps_hidden=self.keeps_hidden)
        kv.states[kv.rows, width] = _Kept(state, forward.kinds, forward.shapes)
        return state

    def find_once(self, inputs: Inputs, kv: KVCache, depth: int | None, last_token: bool) -> StepState | ModelRan:
        """Return a state for one pass with these inputs, which may omit all logits but the last token's."""
        found = self._program_for(Forward(self._model, inputs, kv.cache), kv, depth, last_token)
        if isinstance(found, ModelRan):
            return found
        return found.executor.bind(found.args, captured=False, last_token=last_token, keeps_hidden=self.keeps_hidden)

    def _program_for(
        self, forward: Forward, kv: KVCache, depth: int | None, last_token: bool = False
    ) -> Bindable | ModelRan:
        call = functools.partial(self.call_model, forward.inputs, depth)
        if not (kv.is_full and self._has_programs):
            return self.note(run_model(call, last_token, self.keeps_hidden))
        found = self.note(program_for(forward, self._record, self._programs, call, last_token, self.keeps_hidden))
        if isinstance(found, Bindable):
            self._check_weights(found)
        return found

    def note(self, found: Bindable | ModelRan) -> Bindable | ModelRan:
        """Note the graph that the call's first pass ran in."""
        if self.graph is None and found.executor is not None:
            self.graph = self._record.of(Graphs).of(found.executor)
        return found

    def _check_weights(self, found: Bindable) -> None:
        """Have an executor check the model's weights, once in a call."""
        if found.executor not in self._checked:
            self._checked.add(found.executor)
            found.executor.begin(found.args, self._state)

    def call_model(self, inputs: Mapping[str, Any], depth: int | None) -> Any:
        """Call the model, through Dynamo if it is compiled."""
        mark_dynamic(inputs)
        with forced_depth(depth):
            return self._call(**inputs, return_dict=True)
