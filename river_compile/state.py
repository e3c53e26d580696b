"""What is known of each model that the backend has seen.

A model is recognised by its parameters, which are held weakly. This registry is the package's only global state. Each
feature keeps what it knows of a model, or of one traced graph, under a class of its own (``state.of(PackedWeights)``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.lowering.compile import Compiled
from river_compile.passes.program import Fusion, KeptLinear, RiverProgram
from river_compile.upstream.dynamo import GraphEntry

BROKE = "Dynamo broke the graph here"  # stands in the refusal of a piece of a model
T = TypeVar("T")


class Entries:
    """Holds at most one object of each class, under that class."""

    def __init__(self) -> None:
        self._entries: dict[type, object] = {}
        self._lock = threading.Lock()

    def find(self, kind: type[T]) -> T | None:
        """Returns the object of this class, None if there is none."""
        return cast("T | None", self._entries.get(kind))

    def of(self, kind: type[T]) -> T:
        """Returns the object of this class, made without arguments where there is none."""
        with self._lock:
            if kind not in self._entries:
                self._entries[kind] = kind()
            return cast(T, self._entries[kind])

    def put(self, entry: object) -> None:
        """Keeps an object under its class, in the place of an earlier one."""
        with self._lock:
            self._entries[type(entry)] = entry


@dataclass(eq=False)
class GraphRecord(Entries):
    """What became of one traced graph.

    Attributes:
        config, mode: what it was compiled with.
        inputs: how the user's code names its inputs, in order.
        refusal: why it was not rewritten, empty where it was.
        kind: "decode", "prefill", or "other" for a graph that was refused.
        cache: "static" or "dynamic".
        candidates: exit depths with a check.
        compiled: the distinct segments.
        seconds: by stage: rewriting, packing, compiling.
        kept: matrices of the twins that stay in 16 bits.
        token_bytes, packed_bytes: of its twins' packed weights, what a token reads where all blocks are twins, and all.
        fusions: what became of each fusion rule in each segment that it is for.
        own_backbone: whether its passes multiply by the C++ kernels in the backbone's blocks.
        block_paths: module paths of the blocks.
        executor: returns what runs the graph while Dynamo keeps it, None for a graph that was refused.
        entry: what Dynamo keeps of it.
        ranks: of each of the ranks that share the model, what is packed for it; none where it has no others.
    """

    config: RiverConfig
    mode: str | None = None
    inputs: tuple[str, ...] = ()
    refusal: str = ""
    kind: str = "other"
    cache: str = ""
    num_blocks: int = 0
    candidates: tuple[int, ...] = ()
    compiled: tuple[Compiled, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    kept: tuple[KeptLinear, ...] = ()
    token_bytes: int = 0
    packed_bytes: int = 0
    fusions: tuple[Fusion, ...] = ()
    own_backbone: bool = False
    block_paths: tuple[str, ...] = ()
    executor: Callable[[], object | None] = field(default=lambda: None)
    entry: GraphEntry = field(default_factory=GraphEntry)
    ranks: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def options(self) -> tuple[RiverConfig, str | None]:
        """What the user compiled the model with."""
        return self.config, self.mode

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds that its body takes to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def describe(self, program: RiverProgram, compiled: Iterable[Compiled]) -> None:
        """Fills in what a rewritten graph turned out to be."""
        plan = program.plan
        self.kind = plan.kind
        self.cache = plan.cache
        self.num_blocks = plan.num_blocks
        self.candidates = program.candidates
        self.compiled = tuple(compiled)
        self.kept = program.kept
        self.fusions = program.fusions
        self.block_paths = tuple(block.path for block in plan.blocks)


class ModelState(Entries):
    """What is known of one model: its traced graphs, in the order of their compilation, and the features' entries."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[GraphRecord] = []

    def add(self, graph: GraphRecord, limit: int) -> None:
        """Adds a graph that Dynamo is about to keep. Where it keeps `limit` of them, those of other options give way.

        The options that were compiled first go first.
        """
        cached = [g for g in self.graphs if g.entry.cached]
        others = [g for g in cached if g.options != graph.options]
        while others and len(cached) >= limit:
            oldest = others[0].options
            for old in others:
                if old.options == oldest:
                    old.entry.drop()
                    self.graphs.remove(old)
            cached, others = ([g for g in graphs if g.entry.cached] for graphs in (cached, others))
        graph.entry.counts = len(cached) - len(others) >= limit
        self.graphs.append(graph)


_states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def state_of(parameters: Iterable[object]) -> ModelState:
    """Returns the state of the model that owns these parameters, a new one where there is none yet."""
    tensors = [p for p in parameters if isinstance(p, Tensor)]
    with _lock:
        state = _find(tensors) or ModelState()
        for tensor in tensors:
            _states[tensor] = state
        return state


def adopt(state: ModelState, parameters: Iterable[Tensor]) -> None:
    """Notes parameters that were put in the place of some of a model's."""
    with _lock:
        for tensor in parameters:
            _states[tensor] = state


def forget(model: nn.Module) -> None:
    """Forgets a model, and lets Dynamo drop its graphs; what was packed for it is freed with them."""
    tensors = [*model.parameters(), *model.buffers()]
    state = _find(tensors)
    for graph in state.graphs if state else ():
        graph.entry.drop()
    with _lock:
        for tensor in tensors:
            _states.pop(tensor, None)


def find_state(model: nn.Module) -> ModelState | None:
    """Returns the state of a model, or of the one in torch.compile's wrapper; None if the backend never saw it."""
    module = unwrap(model)
    return _find([*module.parameters(), *module.buffers()])


def state_of_model(model: nn.Module, purpose: str) -> ModelState:
    """Returns the state of a model that has run.

    Raises:
        ValueError: none of its graphs reached the backend; the message begins with what the state is wanted for.
    """
    state = find_state(model)
    if state is None or not state.graphs:
        raise ValueError(
            f"{purpose}: this model never reached the river backend; "
            'call model.compile(backend="river") and generate a token first'
        )
    return state


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module in the wrapper that ``torch.compile(model)`` returns, any other module as it is.

    Raises:
        OptionError: (a ``ValueError``) it is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"a model is needed here, a torch.nn.Module, not a {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def _find(tensors: Iterable[Tensor]) -> ModelState | None:
    return next((state for state in map(_states.get, tensors) if state is not None), None)
