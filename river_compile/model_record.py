"""The record of each model that River has seen: its graphs, and what is known of it.

A model is found by its parameters, which are held weakly, so its record goes with them. This registry is the package's
only global state of models.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from river_compile.compile_cache.programs import Origin, ProgramCache
from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.exits import SequenceStates
from river_compile.lowering.inductor import Compiled
from river_compile.model_state import ModelState, model_state
from river_compile.passes.program import Fusion, KeptLinear, Program, RiverProgram
from river_compile.progress import stage_shown
from river_compile.runtime.captures import CaptureLog
from river_compile.runtime.draft_length import DraftLength
from river_compile.runtime.kv_cache import PrefixPool
from river_compile.runtime.offload import OffloadedWeights
from river_compile.runtime.stats import ExitStats
from river_compile.runtime.tensor_parallel import ALONE, Ranks
from river_compile.twins.making import Statistics
from river_compile.twins.observe import Observation
from river_compile.twins.own_text import SelfCalibration
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import TwinWeight
from river_compile.upstream.dynamo import OwnCall, current_stance, drop_graphs

BROKE = "Dynamo broke the graph here"  # in the refusal of a piece of a model


@dataclass(eq=False)
class GraphRecord:
    """What became of one traced graph."""

    config: RiverConfig
    mode: str | None = None
    inputs: tuple[str, ...] = ()  # names in the user's code, in order
    refusal: str = ""  # why it is unsupported; empty if it was rewritten
    # "traced" by Dynamo; "stamped" from a trace of a few layers; "stored" by an earlier process; "derived" from a graph
    # of several tokens
    origin: Origin = "traced"
    program: Program | None = None  # None if it is unsupported
    traced: RiverProgram | None = None  # before its passes; None if an earlier process traced it
    compiled: tuple[Compiled, ...] = ()  # the distinct segments
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    token_bytes: int = 0  # of its twins' packed weights, read by a token at depth 0
    packed_bytes: int = 0  # of its twins' packed weights
    lossless_bytes: int = 0  # of its 16-bit layers' packed weights
    paged_out_bytes: int = 0  # of the parameters that these replace, which are only in their file until they are read
    executor: Callable[[], object | None] = field(default=lambda: None)  # weak: None if nothing keeps it
    code: CodeType | None = None  # that Dynamo traced; None if a call may do more than run the graph
    ranks: Sequence[Mapping[str, Any]] = ()  # by rank, what is packed for it
    captures: CaptureLog = field(default_factory=CaptureLog)
    twins: tuple[TwinWeight, ...] = ()

    @property
    def kind(self) -> str:
        """ "decode", "prefill", or "other" for an unsupported graph."""
        return "other" if self.program is None else self.program.kind

    @property
    def cache(self) -> str:
        """ "static" or "dynamic"; empty for an unsupported graph."""
        return "" if self.program is None else self.program.cache

    @property
    def num_blocks(self) -> int:
        return 0 if self.program is None else self.program.num_blocks

    @property
    def candidates(self) -> tuple[int, ...]:
        """Exit depths with a check."""
        return () if self.program is None else self.program.candidates

    @property
    def kept(self) -> tuple[KeptLinear, ...]:
        """Weights of the twins that stay in 16 bits."""
        return () if self.program is None else self.program.kept

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """The outcome of each fusion rule in each segment."""
        return () if self.program is None else self.program.fusions

    @property
    def options(self) -> tuple[RiverConfig, str | None]:
        """The user's options."""
        return self.config, self.mode

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the model's start and show it in the progress bar."""
        start = time.perf_counter()
        with stage_shown(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Batch(Protocol):
    """A batch that generate calls may join."""

    def join(self, call: Any, mode: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Generate a call's text; None if it has to run alone."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the batch waits."""
        ...


@dataclass(eq=False)
class ModelRecord:
    """What is known of one model."""

    graphs: list[GraphRecord] = field(default_factory=list)  # in the order of compilation
    ranks: Ranks = ALONE  # that share it
    twins: TwinWeights = field(default_factory=TwinWeights)
    observation: Observation | None = None  # statistics of calibration data
    self_calibration: SelfCalibration = field(default_factory=SelfCalibration)
    offloaded: OffloadedWeights = field(default_factory=OffloadedWeights)
    exit_stats: ExitStats = field(default_factory=ExitStats)
    sequences: SequenceStates = field(default_factory=SequenceStates)
    drafts: dict[bool, DraftLength] = field(default_factory=dict)  # by do_sample
    prefixes: PrefixPool = field(default_factory=PrefixPool)
    fallbacks: Counter[str] = field(default_factory=Counter)  # generate calls without River or drafts, by reason
    call: OwnCall | None = None  # of an accelerated model: its own compiled call
    programs: ProgramCache | None = None  # of an accelerated model
    batch_ref: Callable[[], Batch | None] | None = None  # weak: of a batch that generate calls may join
    batch_sizes: set[int] = field(default_factory=set)  # of prompts so far

    @property
    def statistics(self) -> Statistics:
        """Statistics for calibrated quantizers."""
        return Statistics(self.observation, self.self_calibration, self.ranks)

    @property
    def batch(self) -> Batch | None:
        """The batch that generate calls may join."""
        return None if self.batch_ref is None else self.batch_ref()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a call may use the model: its batch, if there is one, waits."""
        batch = self.batch
        return contextlib.nullcontext() if batch is None else batch.alone()

    @property
    def packed(self) -> list[TwinWeight]:
        """The weights of its twins."""
        return [*{id(twin): twin for graph in self.graphs for twin in graph.twins}.values()]

    @property
    def prepared(self) -> int:
        """Graphs compiled and captured so far."""
        return len(self.graphs) + sum(graph.captures.made for graph in self.graphs)

    @property
    def why_not(self) -> str:
        """Why a prompt ran in none of the model's rewritten graphs."""
        refusals = [graph.refusal for graph in reversed(self.graphs) if graph.refusal]
        if refusals:
            return f"it refused: {next((refusal for refusal in refusals if BROKE in refusal), refusals[0])}"
        if self.call is not None:
            return f"Dynamo traced no graph of this call, with the stance {current_stance()!r}"
        reached = "this call did not reach it" if self.graphs else "this model never reached it"
        return f'{reached}. Call model.compile(backend="river")'

    def state_of(self, model: PreTrainedModel) -> ModelState | None:
        """Return the state of an accelerated model, None if it has no identity."""
        return None if self.programs is None else model_state(model, self.programs.config)

    def known_programs(self, model: PreTrainedModel, state: ModelState | None) -> ProgramCache | None:
        """Return the programs that a generate call may use and add to, None if there can be none."""
        if self.programs is None or state is None or not self.programs.begin(model, state.identity):
            return None
        return self.programs

    def write_programs(self) -> None:
        """Write new programs to the compile cache."""
        if self.programs is not None:
            self.programs.write()

    def add(self, graph: GraphRecord) -> None:
        """Add a graph; drop rewritten ones without an executor."""
        self.graphs[:] = [g for g in self.graphs if g.refusal or g.executor() is not None]
        self.graphs.append(graph)


_records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def record_of(parameters: Iterable[object]) -> ModelRecord:
    """Return the record of the model that owns these parameters, a new one if there is none."""
    tensors = [p for p in parameters if isinstance(p, Tensor)]
    with _lock:
        record = _find(tensors) or ModelRecord()
        for tensor in tensors:
            _records[tensor] = record
        return record


def adopt(record: ModelRecord, parameters: Iterable[Tensor]) -> None:
    """Add parameters that replaced some of a model's."""
    with _lock:
        for tensor in parameters:
            _records[tensor] = record


def forget(model: nn.Module) -> None:
    """Drop a model's record and Dynamo's graphs of it, and with them its twins."""
    tensors = [*model.parameters(), *model.buffers()]
    record = _find(tensors)
    if record is not None and record.call is None:
        drop_graphs(model)
    if record is not None and record.twins.packing is not None:
        record.twins.packing.cancel()
    with _lock:
        for tensor in tensors:
            _records.pop(tensor, None)


def find_record(model: nn.Module) -> ModelRecord | None:
    """Return the record of a model or of the model in torch.compile's wrapper, None if there is none."""
    module = unwrap(model)
    return _find([*module.parameters(), *module.buffers()])


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module in torch.compile's wrapper, or the module itself; raise an OptionError for other objects."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"The model must be a torch.nn.Module, got {type(model).__name__}", id="RC006")
    return getattr(model, "_orig_mod", model)


def _find(tensors: Iterable[Tensor]) -> ModelRecord | None:
    return next((record for record in map(_records.get, tensors) if record is not None), None)
