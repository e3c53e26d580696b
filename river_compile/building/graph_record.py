"""The record of each graph of a model: options, outcome, programs, sizes and times, as the report shows them."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from river_compile.config import RiverConfig
from river_compile.exits import WHOLE, threshold_text
from river_compile.lowering.segments import Compiled
from river_compile.passes.program import Fusion, KeptLinear, Program, RiverProgram
from river_compile.progress import stage_shown
from river_compile.runtime.captures import CaptureLog
from river_compile.twins.weights import TwinWeight

Origin = Literal["traced", "stamped", "stored", "derived"]
_ORIGINS: dict[Origin, str] = {
    "traced": "",
    "stamped": ", from a trace of a few layers",
    "stored": ", from the compile cache",
    "derived": ", from the graph of several tokens",
}
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
    backbone_bytes: int = 0  # of its 16-bit layers and head, packed or not, that a token reads
    expert_bytes: int = 0  # of these layers' stacks of experts
    chosen_bytes: int = 0  # of those that a token reads
    paged_out_bytes: int = 0  # of the parameters that these replace, which are only in their file until they are read
    executor: Callable[[], object | None] = field(default=lambda: None)  # weak: None if nothing keeps it
    is_whole_call: bool = False  # whether a call of the model does nothing but run it
    shares: Sequence[Mapping[str, Any]] = ()  # by process, what is packed there, if several share the model
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

    def reads(self, tokens: int) -> float:
        """Return the bytes of weights that a pass of so many tokens reads, in those of one token.

        Each token chooses its experts by itself, as if at random.
        """
        if not self.chosen_bytes:
            return 1.0
        unread = (1 - self.chosen_bytes / self.expert_bytes) ** tokens
        return 1 + (self.expert_bytes * (1 - unread) - self.chosen_bytes) / self.backbone_bytes

    def share(self, process: str) -> dict[str, Any]:
        """Return what this process packed, under its name."""
        return {
            "process": process,
            "matrices": len(self.twins),
            "bytes": sum(twin.nbytes for twin in self.twins),
            "in_16_bits": len(self.kept),
            "least_sqnr": min((twin.quality for twin in self.twins), default=math.inf),
        }

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the model's start and show it in the progress bar."""
        start = time.perf_counter()
        with stage_shown(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def other_groups(self) -> dict[str, int]:
        """The weights, by name, with a group size other than the option's."""
        return {p.name: p.group_size for p in self.twins if p.group_size != self.config.group_size}

    def lines(self) -> Iterator[str]:
        """Yield lines about the graph, for people."""
        if self.refusal:
            yield f"  graph          not rewritten: {self.refusal}"
            return
        config = self.config
        decides = self.kind == "decode" and config.exit_depth is None and config.first_exit != WHOLE
        seconds = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items())
        yield f"  {self.kind:<14} {self.num_blocks} layers, {self.cache} cache{_ORIGINS[self.origin]}; {seconds}"
        yield f"    segments     {', '.join(f'{c.name} x{c.uses}' for c in self.compiled)}"
        if decides and config.threshold is not None:
            yield f"    criterion    {config.criterion}, threshold {threshold_text(config.threshold)}"
        if decides or self.candidates:
            yield f"    exits after  {_ranges(self.candidates or (config.first_exit,))}"
        if self.kind == "decode" and config.deepest is not None:
            yield f"    at latest    after layer {config.deepest} (offload_policy='exit')"
        if self.lossless_bytes:
            yield f"    16-bit layers  {self.lossless_bytes / 1e6:.1f} MB of weights, packed without loss"
        if self.expert_bytes:
            read, held = self.chosen_bytes / 1e6, self.expert_bytes / 1e6
            yield f"    experts      a token reads {read:.1f} MB of the layers' {held:.1f} MB"
        if self.paged_out_bytes:
            yield f"    given back   {self.paged_out_bytes / 1e6:.1f} MB of parameters, which lie in their file alone"
        for reason, count in Counter(k.reason for k in self.kept).items():
            yield f"    in 16 bits   {count} matrices: {reason}"
        for size, count in Counter(self.other_groups.values()).items():
            yield f"    group size   {size} instead of {config.group_size} in {count} matrices"
        if self.token_bytes < self.packed_bytes:
            read, held = self.token_bytes / 1e6, self.packed_bytes / 1e6
            yield f"    experts      a token reads {read:.1f} MB of the twins' {held:.1f} MB"
        for share in self.shares:
            yield (
                f"    {share['process']:<12} {share['matrices']} matrices in 4 bits, {share['bytes'] / 1e6:.1f} MB, "
                f"{share['in_16_bits']} in 16 bits; least SQNR {share['least_sqnr']:.1f} dB"
            )
        yield from _fusion_lines(self.fusions)
        yield from self.captures.lines()


def _fusion_lines(fusions: Sequence[Fusion]) -> Iterator[str]:
    """Yield how often each fusion rule matched, and each reason for a mismatch with its first node."""
    applied = Counter(f.rule for f in fusions if not f.missed)
    if applied:
        yield f"    fused        {', '.join(f'{rule} x{n}' for rule, n in applied.items())}"
    missed = defaultdict(list)
    for fusion in fusions:
        if fusion.missed:
            missed[fusion.rule, fusion.missed].append(fusion)
    for (rule, reason), found in missed.items():
        where = f" at {found[0].node}" if found[0].node else ""
        segments = found[0].segment + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        yield f"    not fused    {rule} in {segments}: {reason}{where}"


def _ranges(depths: tuple[int, ...]) -> str:
    if len(depths) == 1:
        return f"layer {depths[0]}"
    step = depths[1] - depths[0]
    return f"layers {depths[0]} to {depths[-1]}" + (f", every {step}" if step > 1 else "")


class Graphs(list[GraphRecord]):
    """A model's graphs in the order of their compilation."""

    def of(self, executor: object) -> GraphRecord | None:
        """Return the graph of an executor, None if this model has no such graph."""
        return next((graph for graph in self if graph.executor() is executor), None)

    @property
    def packed(self) -> list[TwinWeight]:
        """The weights of its twins."""
        return [*{id(twin): twin for graph in self for twin in graph.twins}.values()]

    @property
    def prepared(self) -> int:
        """Graphs compiled and captured so far."""
        return len(self) + sum(graph.captures.made for graph in self)

    @property
    def why_not(self) -> str:
        """Why graphs were not rewritten; empty where all were."""
        refusals = [graph.refusal for graph in reversed(self) if graph.refusal]
        return next((refusal for refusal in refusals if BROKE in refusal), next(iter(refusals), ""))

    def add(self, graph: GraphRecord) -> None:
        """Add a graph; drop rewritten ones without an executor."""
        self[:] = [g for g in self if g.refusal or g.executor() is not None]
        self.append(graph)
