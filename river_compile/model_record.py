"""The record of each model that the backend has seen: its graphs, and what is known of it, in named fields.

A model is recognised by its parameters, which are held weakly: when they go, so does its record. This registry is the
package's only global state of models.
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
from river_compile.twins.observe import Observation
from river_compile.twins.own_text import SelfCalibration
from river_compile.twins.pack import Statistics, TwinWeights
from river_compile.twins.weights import TwinWeight
from river_compile.upstream.dynamo import OwnCall, drop_graphs

BROKE = "Dynamo broke the graph here"  # stands in the refusal of a piece of a model


@dataclass(eq=False)
class GraphRecord:
    """What became of one traced graph.

    Attributes:
        config, mode: what it was compiled with.
        inputs: how the user's code names its inputs, in order.
        refusal: why it was not rewritten, empty where it was.
        origin: "traced" by Dynamo, "stored" by an earlier process, or "derived" from a graph of several tokens.
        program: what it became, None for a graph that was refused.
        traced: the decoder that Dynamo traced, before it was rewritten; None where an earlier process traced it.
        compiled: the distinct segments.
        seconds: by stage: rewriting, packing, compiling.
        token_bytes, packed_bytes: of its twins' packed weights, what a token reads where all blocks are twins, and all.
        lossless_bytes, paged_out_bytes: of its backbone's weights that are packed without loss, and of their parameters
            that a file holds, which leave the process's memory until somebody reads them.
        executor: returns what runs the graph while somebody keeps it, None for a graph that was refused.
        code: of the function that Dynamo traced; None where a call of it may do more than to run the graph.
        ranks: of each of the ranks that share the model, what is packed for it; none where it has no others.
        captures: what was captured of it.
        twins: the packed matrices of its twins.
    """

    config: RiverConfig
    mode: str | None = None
    inputs: tuple[str, ...] = ()
    refusal: str = ""
    origin: Origin = "traced"
    program: Program | None = None
    traced: RiverProgram | None = None
    compiled: tuple[Compiled, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    token_bytes: int = 0
    packed_bytes: int = 0
    lossless_bytes: int = 0
    paged_out_bytes: int = 0
    executor: Callable[[], object | None] = field(default=lambda: None)
    code: CodeType | None = None
    ranks: Sequence[Mapping[str, Any]] = ()
    captures: CaptureLog = field(default_factory=CaptureLog)
    twins: tuple[TwinWeight, ...] = ()

    @property
    def kind(self) -> str:
        """ "decode", "prefill", or "other" for a graph that was refused."""
        return "other" if self.program is None else self.program.kind

    @property
    def cache(self) -> str:
        """ "static" or "dynamic"; empty for a graph that was refused."""
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
        """Matrices of the twins that stay in 16 bits."""
        return () if self.program is None else self.program.kept

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """What became of each fusion rule in each segment that it is for."""
        return () if self.program is None else self.program.fusions

    @property
    def options(self) -> tuple[RiverConfig, str | None]:
        """What the user compiled the model with."""
        return self.config, self.mode

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds that its body takes to a stage, and shows it as a part of the model's start."""
        start = time.perf_counter()
        with stage_shown(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Joinable(Protocol):
    """A batch that calls of generate may join."""

    def join(self, call: Any, mode: Any, kwargs: Mapping[str, Any]) -> object | None:
        """Takes over a call of the batch's own thread, and returns what stands for its result; None if it does not."""
        ...


@dataclass(eq=False)
class ModelRecord:
    """What is known of one model; `graphs` in the order of their compilation."""

    graphs: list[GraphRecord] = field(default_factory=list)
    ranks: Ranks = ALONE  # that share it
    twins: TwinWeights = field(default_factory=TwinWeights)
    observation: Observation | None = None  # of texts that a user gave
    self_calibration: SelfCalibration = field(default_factory=SelfCalibration)
    offloaded: OffloadedWeights = field(default_factory=OffloadedWeights)
    exit_stats: ExitStats = field(default_factory=ExitStats)
    sequences: SequenceStates = field(default_factory=SequenceStates)
    drafts: dict[bool, DraftLength] = field(default_factory=dict)  # by whether tokens are sampled
    prefixes: PrefixPool = field(default_factory=PrefixPool)
    fallbacks: Counter[str] = field(default_factory=Counter)  # calls of generate that ran plainly, by reason
    call: OwnCall | None = None  # of an accelerated model: its own compiled call
    programs: ProgramCache | None = None  # of an accelerated model
    batch: Joinable | None = None  # that calls of generate may join
    batch_sizes: set[int] = field(default_factory=set)  # of prompts that ran

    @property
    def statistics(self) -> Statistics:
        """What quantizers may know of the inputs of its matrices."""
        return Statistics(self.observation, self.self_calibration, self.ranks)

    @property
    def packed(self) -> list[TwinWeight]:
        """The weights of its twins."""
        return [*{id(twin): twin for graph in self.graphs for twin in graph.twins}.values()]

    @property
    def prepared(self) -> int:
        """How many of its graphs were compiled and captured so far."""
        return len(self.graphs) + sum(graph.captures.made for graph in self.graphs)

    @property
    def why_not(self) -> str:
        """Why a prompt ran in none of the model's rewritten graphs, given that it did."""
        if not self.graphs:
            return 'this model never reached it; call model.compile(backend="river")'
        refusals = [graph.refusal for graph in reversed(self.graphs) if graph.refusal]
        refusal = next((refusal for refusal in refusals if BROKE in refusal), refusals[0] if refusals else "")
        return f"it refused: {refusal}" if refusal else 'this call did not reach it: use model.compile(backend="river")'

    def state_of(self, model: PreTrainedModel) -> ModelState | None:
        """Returns what the passes of an accelerated model depend on now, None where that is not known."""
        return None if self.programs is None else model_state(model, self.programs.config)

    def known_programs(self, model: PreTrainedModel, state: ModelState | None) -> ProgramCache | None:
        """Returns the programs that a call of `generate` may recall and keep; None where there can be none."""
        if self.programs is None or state is None or not self.programs.begin(model, state.identity):
            return None
        return self.programs

    def write_programs(self) -> None:
        """Writes what was traced, for other processes."""
        if self.programs is not None:
            self.programs.write()

    def add(self, graph: GraphRecord) -> None:
        """Adds a graph that is being compiled; rewritten ones that nobody runs any more go."""
        self.graphs[:] = [g for g in self.graphs if g.refusal or g.executor() is not None]
        self.graphs.append(graph)


_records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def record_of(parameters: Iterable[object]) -> ModelRecord:
    """Returns the record of the model that owns these parameters, a new one where there is none yet."""
    tensors = [p for p in parameters if isinstance(p, Tensor)]
    with _lock:
        record = _find(tensors) or ModelRecord()
        for tensor in tensors:
            _records[tensor] = record
        return record


def adopt(record: ModelRecord, parameters: Iterable[Tensor]) -> None:
    """Notes parameters that were put in the place of some of a model's."""
    with _lock:
        for tensor in parameters:
            _records[tensor] = record


def forget(model: nn.Module) -> None:
    """Forgets a model, and lets Dynamo drop its graphs; what was packed for it is freed with them."""
    tensors = [*model.parameters(), *model.buffers()]
    record = _find(tensors)
    if record is not None and record.call is None:
        drop_graphs(model)
    with _lock:
        for tensor in tensors:
            _records.pop(tensor, None)


def find_record(model: nn.Module) -> ModelRecord | None:
    """Returns the record of a model, or of the one in torch.compile's wrapper; None if the backend never saw it."""
    module = unwrap(model)
    return _find([*module.parameters(), *module.buffers()])


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module in the wrapper that ``torch.compile(model)`` returns, any other module as it is.

    Raises:
        OptionError: (a ``ValueError``) it is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"a model is needed here, a torch.nn.Module, not a {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def _find(tensors: Iterable[Tensor]) -> ModelRecord | None:
    return next((record for record in map(_records.get, tensors) if record is not None), None)
