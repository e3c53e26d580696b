"""Reports the backend's work on a model, for people (``print``) and programs (``to_dict``).

What each of several ranks packed is exchanged when a graph is made, so that any rank can report it later.

Not handled: several tokens at once in the bytes that a token reads, which may choose different experts.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from river_compile.errors import RiverWarning
from river_compile.exits import WHOLE, threshold_text
from river_compile.model_record import GraphRecord, ModelRecord, find_record, unwrap
from river_compile.passes.moe_router import ROUTER
from river_compile.passes.program import Fusion, Program, SegmentSpec
from river_compile.runtime.kv_cache import KeptTexts
from river_compile.runtime.stats import ExactStats
from river_compile.runtime.tensor_parallel import Ranks
from river_compile.twins.quantize import UNOBSERVED
from river_compile.twins.self_calibration import SelfCalibration
from river_compile.twins.twin_kl import TwinLoss
from river_compile.twins.weights import TwinWeight

_NEVER_RAN = (
    "never ran: no graph of this model reached the backend. torch.compile(model).generate runs the original model; "
    'use model.compile(backend="river") or model.forward = torch.compile(model.forward, backend="river"), then '
    "generate"
)
_ORIGINS = {"traced": "", "stored": ", from the compile cache", "derived": ", from the graph of several tokens"}
_BAR = 32


@dataclass(frozen=True)
class Report:
    """Snapshot of a model's graphs, packed weights and exits; see :func:`report`.

    `packed_again` says how often weights were found changed, and how many matrices were packed again the last time.
    """

    model: str
    graphs: tuple[GraphRecord, ...]
    packed: tuple[TwinWeight, ...]
    packing_seconds: float
    packed_again: tuple[int, int]
    decode_depths: dict[int, int]
    prefill_depths: dict[int, int]
    exact: ExactStats
    own_text: SelfCalibration = field(default_factory=SelfCalibration)
    loss: TwinLoss | None = None
    offloaded: dict[str, Any] | None = None  # `OffloadedWeights.stats`
    kept_cache: int = 0  # bytes of keys and values
    kept_texts: KeptTexts = field(default_factory=KeptTexts)
    plain_calls: dict[str, int] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        return bool(self.graphs)

    @property
    def recompiles(self) -> int:
        """Graphs traced again for options, a kind and a cache that had one already, such as a new batch size."""
        kinds = Counter((g.config, g.mode, g.kind, g.cache) for g in self.graphs if not g.refusal)
        return sum(n - 1 for n in kinds.values())

    @property
    def mean_depth(self) -> float:
        """Mean blocks executed per decode step, NaN before the first."""
        steps = sum(self.decode_depths.values())
        return sum(d * n for d, n in self.decode_depths.items()) / steps if steps else math.nan

    def to_dict(self) -> dict[str, object]:
        """Returns the report as values that ``json.dumps`` takes; numbers that do not exist are None."""
        return {
            "model": self.model,
            "ran": self.ran,
            "graphs": [_graph_dict(g) for g in self.graphs],
            "recompiles": self.recompiles,
            "kept_cache_bytes": self.kept_cache,
            "kept_texts": self.kept_texts._asdict(),
            "plain_calls": dict(self.plain_calls),
            "packed_bytes": sum(p.nbytes for p in self.packed),
            "packing_seconds": self.packing_seconds,
            "packed_again": self.packed_again[0],
            "offloaded": self.offloaded,
            "matrices": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "group_size": p.group_size,
                    "quantizer": p.quantizer,
                    "statistics": p.statistics or None,
                    "sqnr_db": _finite(p.sqnr),
                    "output_sqnr_db": _finite(p.output_sqnr),
                    "bytes": p.nbytes,
                    "artifact": p.artifact or None,
                }
                for p in self.packed
            ],
            "own_text_refused": self.own_text.refusal or None,
            "twin_loss": self.loss and {**asdict(self.loss), "large": self.loss.large},
            "exit_depths": dict(self.decode_depths),
            "prefill_exit_depths": dict(self.prefill_depths),
            "mean_exit_depth": _finite(self.mean_depth),
            "exact": {**self.exact._asdict(), "by_source": dict(self.exact.by_source)},
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"River Compile report for {self.model}"
        if not (self.ran or self.plain_calls):
            yield f"  {_NEVER_RAN}"
            yield from _plain_call_lines(self)
            return
        for graph in self.graphs:
            yield from graph_lines(graph)
        if self.packed:
            yield from _packed_lines(self)
        if self.offloaded:
            yield from _offload_lines(self.offloaded)
        yield f"  recompiles     {self.recompiles}"
        if self.kept_cache:
            yield f"  kept cache     {self.kept_cache / 1e6:.1f} MB of keys and values, for the next call of generate"
        kept = self.kept_texts
        if kept.texts or kept.reused:
            yield (
                f"  kept texts     {kept.texts} of {kept.tokens} tokens, {kept.saved_bytes / 1e6:.1f} MB beside the "
                f"cache; {kept.reused} tokens of prompts were there already"
            )
        yield from _plain_call_lines(self)
        yield from token_lines(self)


def report(model: nn.Module) -> Report:
    """Reports what the backend found, rewrote and refused in a model, and where its tokens left.

    The first report of twins that were packed with statistics estimates what they lose, which takes some seconds.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.
    """
    record = find_record(model) or ModelRecord()
    stats, packed = record.exit_stats, record.twins
    if not record.ranks.several:
        packed.judge(record.packed, record.statistics)
    return Report(
        model=type(unwrap(model)).__name__,
        graphs=tuple(record.graphs),
        packed=tuple(sorted(record.packed, key=lambda p: _natural(p.name))),
        packing_seconds=packed.seconds,
        packed_again=(packed.changes, packed.changed),
        decode_depths=dict(sorted(stats.decode.items())),
        prefill_depths=dict(sorted(stats.prefill.items())),
        exact=stats.exact,
        own_text=record.self_calibration,
        loss=packed.loss,
        offloaded=record.offloaded.sample() or None,
        kept_cache=record.prefixes.bytes,
        kept_texts=record.prefixes.texts,
        plain_calls=dict(record.fallbacks),
    )


def _graph_dict(graph: GraphRecord) -> dict[str, object]:
    return {
        "kind": graph.kind,
        "cache": graph.cache,
        "origin": graph.origin,
        "refusal": graph.refusal,
        "blocks": graph.num_blocks,
        "criterion": graph.config.criterion,
        "candidate_depths": list(graph.candidates),
        "segments": [
            {"name": c.name, "uses": c.uses, "compile_seconds": c.seconds, "direct": c.direct} for c in graph.compiled
        ],
        "seconds": dict(graph.seconds),
        "kept_in_16_bits": [{"name": k.name, "reason": k.reason} for k in graph.kept],
        "other_group_sizes": _other_groups(graph),
        "packed_bytes": graph.packed_bytes,
        "lossless_bytes": graph.lossless_bytes,
        "given_back_bytes": graph.paged_out_bytes,
        "token_bytes": graph.token_bytes,
        "fused": dict(Counter(f.rule for f in graph.fusions if not f.missed)),
        "missed": [
            {"rule": f.rule, "segment": f.segment, "reason": f.missed, "node": f.node}
            for f in graph.fusions
            if f.missed
        ],
        "captures": graph.captures.to_dict(),
        "ranks": [dict(rank) for rank in graph.ranks],
    }


def _other_groups(graph: GraphRecord) -> dict[str, int]:
    """Returns the matrices, by name, that did not take the group size that was asked for."""
    return {p.name: p.group_size for p in graph.twins if p.group_size != graph.config.group_size}


def graph_lines(graph: GraphRecord) -> Iterator[str]:
    """Yields the outcome of one traced graph, for people."""
    if graph.refusal:
        yield f"  graph          not rewritten: {graph.refusal}"
        return
    config = graph.config
    decides = graph.kind == "decode" and config.exit_depth is None and config.first_exit != WHOLE
    seconds = ", ".join(f"{stage} {s:.1f} s" for stage, s in graph.seconds.items())
    yield f"  {graph.kind:<14} {graph.num_blocks} blocks, {graph.cache} cache{_ORIGINS[graph.origin]}; {seconds}"
    yield f"    segments     {', '.join(f'{c.name} x{c.uses}' for c in graph.compiled)}"
    if decides and config.threshold is not None:
        yield f"    criterion    {config.criterion}, threshold {threshold_text(config.threshold)}"
    if decides or graph.candidates:
        yield f"    exits after  {_ranges(graph.candidates or (config.first_exit,))}"
    if graph.kind == "decode" and config.deepest is not None:
        yield f"    at latest    after block {config.deepest} (offload_policy='exit')"
    if graph.lossless_bytes:
        paged_out = graph.paged_out_bytes / 1e6
        back = f"; {paged_out:.1f} MB of parameters lie in their file alone" if paged_out else ""
        yield f"    backbone     {graph.lossless_bytes / 1e6:.1f} MB of weights, packed without loss{back}"
    for reason, count in Counter(k.reason for k in graph.kept).items():
        yield f"    in 16 bits   {count} matrices: {reason}"
    for size, count in Counter(_other_groups(graph).values()).items():
        yield f"    group size   {size} instead of {config.group_size} in {count} matrices"
    if graph.token_bytes < graph.packed_bytes:
        read, held = graph.token_bytes / 1e6, graph.packed_bytes / 1e6
        yield f"    experts      a token reads {read:.1f} MB of the twins' {held:.1f} MB"
    for rank in graph.ranks:
        yield (
            f"    {rank['rank']:<12} {rank['matrices']} matrices in 4 bits, {rank['bytes'] / 1e6:.1f} MB, "
            f"{rank['in_16_bits']} in 16 bits; least SQNR {rank['least_sqnr']:.1f} dB"
        )
    yield from _fusion_lines(graph.fusions)
    yield from graph.captures.lines()


def _fusion_lines(fusions: Sequence[Fusion]) -> Iterator[str]:
    """Yields which rules put how many kernels in, and each reason for which some did not, with its first node."""
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


def _packed_lines(report: Report) -> Iterator[str]:
    packed = report.packed
    size = sum(p.nbytes for p in packed) / 1e6
    quantizers = ", ".join(sorted({p.quantizer for p in packed}))
    yield f"  packed         {len(packed)} matrices ({quantizers}), {size:.1f} MB, in {report.packing_seconds:.1f} s"
    times, matrices = report.packed_again
    if times:
        yield f"    packed again   {times} times after weights changed, {matrices} matrices the last time"
    for folder, count in Counter(p.artifact for p in packed if p.artifact).items():
        yield f"    artifact     {count} matrices read from {folder}"
    for source, count in Counter(p.statistics for p in packed if p.statistics).items():
        yield f"    statistics   {count} matrices know what they read, from {source}"
    without = sum(p.asked != p.quantizer for p in packed)
    if without:
        why = f": the model wrote no text of its own ({report.own_text.refusal})" if report.own_text.refusal else ""
        yield f"    statistics   none for {without} matrices, which took quantizer={UNOBSERVED!r}{why}"
    yield from _loss_lines(report.loss)
    yield _sqnr_line("SQNR of weights", {p.name: p.sqnr for p in report.packed})
    observed = {p.name: p.output_sqnr for p in report.packed if p.output_sqnr is not None}
    if observed:
        yield _sqnr_line("SQNR of outputs", observed)


def _offload_lines(stats: Mapping[str, Any]) -> Iterator[str]:
    first, last = stats["blocks"]
    sizes = ("moved", "resident", "weights", "peak_before", "peak_after", "brought_in")
    moved, resident, weights, before, after, brought_in = (stats[name] / 1e6 for name in sizes)
    yield f"  offloaded      blocks {first} to {last}, {moved:.1f} MB in {stats['where']}; {stats['policy']!r}"
    share = 100 * resident / weights
    yield f"    resident     {resident:.1f} of {weights:.1f} MB of weights and twins ({share:.0f} %)"
    yield f"    peak memory  {before:.1f} MB before, {after:.1f} MB since; {brought_in:.1f} MB brought in"


def _plain_call_lines(report: Report) -> Iterator[str]:
    for reason, count in report.plain_calls.items():
        yield f"  without drafts {count} calls of generate: {reason}"


def _loss_lines(loss: TwinLoss | None) -> Iterator[str]:
    if loss is not None:
        yield f"    loss         {loss}, all blocks in 4 bits"
    if loss is not None and loss.large:
        yield "                 WARNING: that is much. Tokens that leave early may well be others than the model's:"
        yield "                 keep to exact mode, calibrate, or observe() text like that which it is for"


def _sqnr_line(title: str, decibels: Mapping[str, float]) -> str:
    finite = [db for db in decibels.values() if math.isfinite(db)]
    mean = sum(finite) / len(finite) if finite else math.inf
    name, least = min(decibels.items(), key=lambda item: item[1])
    first, *others = name.split("|")  # products that read one input: what their paths share is said once
    name = "|".join([first, *(path.rpartition(".")[2] for path in others)])
    return f"    {title}  mean {mean:.1f} dB, least {least:.1f} dB ({name})"


def token_lines(report: Report) -> Iterator[str]:
    total, exact = sum(report.decode_depths.values()), report.exact
    if not total:
        yield "  exits          no token was decoded yet"
    else:
        yield f"  exits          {total} decode steps, mean depth {report.mean_depth:.2f} blocks"
    yield from histogram(report.decode_depths)
    if exact.cycles:
        yield f"  exact mode     {exact.cycles} verifying passes, {exact.kept / exact.cycles:.2f} tokens per pass"
    for source, (drafted, accepted) in exact.by_source.items():
        yield f"    {source:<12} {100 * accepted / drafted:.0f} % of {drafted} drafted tokens held"


def histogram(depths: Mapping[int, int], num_blocks: int | None = None) -> list[str]:
    """Returns a bar for each exit depth, as lines of text; `num_blocks` is that of tokens which never left."""
    total, most = sum(depths.values()), max(depths.values(), default=1)
    return [
        f"    depth {depth:>3}    {'#' * max(1, round(_BAR * n / most)):<{_BAR}} {n:>6} ({100 * n / total:.0f} %)"
        + ("  never left" if depth == num_blocks else "")
        for depth, n in sorted(depths.items())
    ]


def _ranges(depths: tuple[int, ...]) -> str:
    if len(depths) == 1:
        return f"block {depths[0]}"
    step = depths[1] - depths[0]
    return f"blocks {depths[0]} to {depths[-1]}" + (f", every {step}" if step > 1 else "")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _natural(name: str) -> list[object]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def note_ranks(program: Program, record: GraphRecord, ranks: Ranks) -> None:
    """Notes each rank's packed matrices of a graph; warns of matrices that stay in 16 bits, routers aside."""
    if not ranks.several or not program.twins:
        return
    packed = record.twins
    mine = {
        "rank": ranks.name,
        "matrices": len(packed),
        "bytes": sum(site.nbytes for site in packed),
        "in_16_bits": len(program.kept),
        "least_sqnr": min((site.quality for site in packed), default=math.inf),
    }
    record.ranks = ranks.gather(mine)
    kept = [linear for linear in program.kept if linear.reason != ROUTER]
    if kept:
        warnings.warn(
            f"{len(kept)} matrices of the twins of a {program.kind} graph stay in 16 bits on {ranks.name}, so "
            f"that tokens that leave read more than they need to; the first is {kept[0].name}: {kept[0].reason}",
            RiverWarning,
            stacklevel=2,
        )


def bytes_of_token(segment: SegmentSpec, values: Sequence[object], first: int = 0) -> int:
    """Returns the bytes that one token reads of the values of a segment's placeholders.

    Args:
        segment: what reads them.
        values: tensors, and others that do not count, in the order of the placeholders.
        first: the placeholder of the first of them.
    """
    chosen = dict(segment.experts)
    return sum(
        (value[: chosen[place]] if place in chosen else value).nbytes
        for place, value in enumerate(values, start=first)
        if isinstance(value, Tensor)
    )
