"""What is known of each model that the backend has seen: its packed weights, statistics and rewritten graphs.

A model is recognised by its parameters, which are held weakly. This registry is the package's only global state.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.cudagraphs.device import CaptureLog
from river_compile.lowering.compile import Compiled
from river_compile.offload.weights import OffloadedWeights
from river_compile.passes.program import Fusion, KeptLinear, RiverProgram
from river_compile.runtime.trace import ExitStats
from river_compile.twins.make import PackedSite
from river_compile.twins.pack import PackedWeights

from .config import RiverConfig
from .exits import Memories

if TYPE_CHECKING:
    from river_compile.speculative.batch_invariant import SameRows
    from river_compile.twins.block_errors import BlockErrors
    from river_compile.twins.observe import Observation

_ids = itertools.count(1)


@dataclass
class GraphRecord:
    """What became of one traced graph.

    Attributes:
        config: the options it was compiled with.
        mode: the mode it was compiled with.
        refusal: why it was not rewritten, empty where it was.
        kind: "decode", "prefill", or "other" for a graph that was refused.
        cache: "static" or "dynamic".
        num_blocks: decoder blocks found.
        candidates: exit depths with a check.
        compiled: the distinct segments.
        seconds: seconds by stage: rewriting, packing, compiling.
        kept: matrices of the twins that stay in 16 bits.
        fusions: what became of each fusion rule in each segment that it is for.
        packed: the matrices of the twins.
        block_paths: module paths of the blocks.
        captures: which of its decode steps were captured, and why others were not.
    """

    config: RiverConfig
    mode: str | None = None
    refusal: str = ""
    kind: str = "other"
    cache: str = ""
    num_blocks: int = 0
    candidates: tuple[int, ...] = ()
    compiled: tuple[Compiled, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    kept: tuple[KeptLinear, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    packed: tuple[PackedSite, ...] = ()
    block_paths: tuple[str, ...] = ()
    captures: CaptureLog = field(default_factory=CaptureLog)

    def describe(self, program: RiverProgram, compiled: Iterable[Compiled], sites: Iterable[PackedSite]) -> None:
        """Fills in what a rewritten graph turned out to be."""
        plan = program.plan
        self.kind = plan.kind
        self.cache = plan.blocks[0].kv.kind
        self.num_blocks = plan.num_blocks
        self.candidates = program.candidates
        self.compiled = tuple(compiled)
        self.kept = program.kept
        self.fusions = program.fusions
        self.packed = tuple(sites)
        self.block_paths = tuple(block.path for block in plan.blocks)


class ModelState:
    """Everything the backend keeps for one model."""

    def __init__(self) -> None:
        self.id = next(_ids)
        self.stats = ExitStats(self.id)
        self.memories = Memories()
        self.packed = PackedWeights()
        self.offloaded = OffloadedWeights()
        self.observation: Observation | None = None
        self.block_errors: BlockErrors | None = None
        self.graphs: list[GraphRecord] = []
        self.same_rows: dict[tuple, SameRows] = {}


_states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def find_state(parameters: Iterable[Tensor]) -> ModelState | None:
    """Returns the state of the model that owns one of these parameters, None where the backend never saw it."""
    for parameter in parameters:
        state = _states.get(parameter)
        if state is not None:
            return state
    return None


def state_of(parameters: Iterable[Tensor]) -> ModelState:
    """Returns the state of the model that owns these parameters, a new one where the backend never saw it."""
    parameters = [p for p in parameters if isinstance(p, torch.Tensor)]
    with _lock:
        state = find_state(parameters) or ModelState()
        for parameter in parameters:
            _states[parameter] = state
        return state
