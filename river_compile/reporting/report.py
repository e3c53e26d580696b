"""The report of a model: its graphs, twins, exits and drafts, for people (``print``) and programs (``to_dict``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.kernels.native import cores
from river_compile.kernels.native.load import loaded
from river_compile.record import ModelRecord, find_record, unwrap
from river_compile.runtime.placement import Placement
from river_compile.runtime.stats import ExactStats, ExitStats
from river_compile.twins.making import Statistics
from river_compile.twins.pack import TwinWeights
from river_compile.twins.quantize import UNOBSERVED
from river_compile.twins.weights import TwinWeight
from river_compile.upstream.dynamo import OwnCall

_NEVER_RAN = (
    "never ran: no graph of this model reached the backend. torch.compile(model).generate runs the original model; "
    'use model.compile(backend="river") or model.forward = torch.compile(model.forward, backend="river"), then '
    "generate"
)
_NOT_YET = "nothing to report yet: the first call of generate traces the model and quantizes its twins"
_BAR = 32


class Fallbacks(Counter[str]):
    """Calls of generate without River or drafts, by reason."""


@dataclass(frozen=True)
class Report:
    """What River did with a model: ``print`` it, or take `to_dict`; `report` makes it.

        found = river_compile.report(model)
        print(found)
        print(found.to_dict()["exact"], found.mean_depth)

    Attributes:
        model: name of the model's class.
        record: what each part of River keeps of the model.
        decode_depths: decode steps by exit depth, when the report was made.
        prefill_depths: prompts by exit depth.
        exact: totals of speculative decoding.
    """

    model: str
    record: ModelRecord
    decode_depths: dict[int, int]
    prefill_depths: dict[int, int]
    exact: ExactStats

    @property
    def graphs(self) -> tuple[GraphRecord, ...]:
        return tuple(self.record.of(Graphs))

    @property
    def packed(self) -> list[TwinWeight]:
        """The twins' weights in the order of their layers."""
        return sorted(self.record.of(Graphs).packed, key=lambda twin: _natural(twin.name))

    @property
    def ran(self) -> bool:
        return bool(self.record.of(Graphs))

    @property
    def recompiles(self) -> int:
        """Graphs traced again for the same options, kind and KV cache, such as a new batch size."""
        kinds = Counter((g.config, g.mode, g.kind, g.cache) for g in self.graphs if not g.refusal)
        return sum(n - 1 for n in kinds.values())

    @property
    def mean_depth(self) -> float:
        """Mean layers executed per decode step, NaN before the first."""
        steps = sum(self.decode_depths.values())
        return sum(d * n for d, n in self.decode_depths.items()) / steps if steps else math.nan

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON's types; a number that does not exist is None."""
        record, twins, prefixes = self.record, self.record.of(TwinWeights), self.record.of(PrefixPool)
        share, loss = twins.background.share, twins.loss.value
        return {
            "model": self.model,
            "ran": self.ran,
            "graphs": [_graph_dict(g) for g in self.graphs],
            "recompiles": self.recompiles,
            "threads": cores.threads(),
            "kept_cache_bytes": prefixes.bytes,
            "kept_texts": prefixes.texts._asdict(),
            "plain_calls": dict(record.of(Fallbacks)),
            "packed_bytes": sum(twin.nbytes for twin in self.packed),
            "packing_seconds": twins.packing_seconds,
            "packing_in_background": None if share is None else round(share, 3),
            "drafts_with_quick_twins": twins.background.refines,
            "packing_for_later": twins.background.writes,
            "packed_again": twins.changes,
            **record.of(Placement).to_dict(),
            "matrices": [_weight_dict(twin) for twin in self.packed],
            "own_text_refused": record.of(Statistics).own.refusal or None,
            "exit_rule": self._exit_rule(),
            "twin_loss": loss and {**asdict(loss), "large": loss.large},
            "exit_depths": self.decode_depths,
            "prefill_exit_depths": self.prefill_depths,
            "mean_exit_depth": _finite(self.mean_depth),
            "exact": {
                "cycles": self.exact.cycles,
                "drafted": self.exact.drafted,
                "accepted": self.exact.accepted,
                "kept": self.exact.emitted,
                "by_source": dict(self.exact.by_source),
            },
        }

    @property
    def _budget(self) -> float | None:
        """KL that the exit rule is tuned to; None: the options have a rule."""
        return next((graph.config.budget for graph in self.graphs if graph.config.budget is not None), None)

    def _exit_rule(self) -> dict[str, object] | None:
        """Return the rule that was tuned, as JSON's types; None if the options have one."""
        if self._budget is None:
            return None
        exits = self.record.of(TwinWeights).exits
        rule = {} if exits.rule is None else asdict(exits.rule)
        numbers = {name: _finite(value) if isinstance(value, float) else value for name, value in rule.items()}
        return {"budget": self._budget, **numbers, "refusal": exits.refusal or None}

    def __str__(self) -> str:
        return "\n".join([f"River Compile report for {self.model}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        record, twins, fallbacks = self.record, self.record.of(TwinWeights), self.record.of(Fallbacks)
        if not (self.ran or fallbacks):
            yield f"  {_NEVER_RAN if record.find(OwnCall) is None else _NOT_YET}"
            return
        if self.ran:
            for graph in self.graphs:
                yield from graph.lines()
            if self.packed:
                yield from _twin_lines(record, self.packed)
            if (share := twins.background.share) is not None:
                what = "drafts" if self._budget is None else "exits"
                what = "drafts get better twins" if twins.background.refines else f"{what} begin afterwards"
                yield f"  packing        {share:.0%} done in the background; {what}"
            if self._budget is not None:
                yield f"  exit rule      {twins.exits}"
            yield from record.of(Placement).lines()
            if twins.background.writes:
                yield "  packing        the 16-bit layers without loss in the background, for later processes"
            if loaded() and (why := cores.limit_text()):
                yield f"  threads        {cores.threads()}{why}"
            yield f"  recompiles     {self.recompiles}"
            yield from _cache_lines(record)
        for reason, count in fallbacks.items():
            yield f"  without drafts {count} calls of generate: {reason}"
        if self.ran:
            yield from _token_lines(self)


def report(model: nn.Module, estimate_loss: bool = False) -> Report:
    """Report which graphs of a model River rewrote, which it did not and why, and at which depths tokens exited.

        print(river_compile.report(model))

    Args:
        model: an accelerated or compiled model, or the wrapper that ``torch.compile`` returned.
        estimate_loss: whether to measure the KL divergence that the twins cause together, if it is not known yet. It
            runs the model on text that it samples: seconds for 100 million parameters, minutes for 8 billion.

    Raises:
        OptionError: (a ``ValueError``) the argument is not a module.
    """
    record = find_record(model) or ModelRecord()
    if estimate_loss:
        record.of(TwinWeights).loss.estimate(record.of(Graphs).packed, record.of(Statistics).now())
    depths = record.of(ExitStats)
    return Report(
        type(unwrap(model)).__name__,
        record,
        dict(sorted(depths.decode.items())),
        dict(sorted(depths.prefill.items())),
        depths.exact,
    )


def _weight_dict(twin: TwinWeight) -> dict[str, object]:
    return {
        "name": twin.name,
        "shape": list(twin.shape),
        "group_size": twin.group_size,
        "quantizer": twin.quantizer,
        "statistics": twin.statistics or None,
        "sqnr_db": _finite(twin.sqnr),
        "output_sqnr_db": _finite(twin.output_sqnr),
        "bytes": twin.nbytes,
        "folder": twin.folder or None,
    }


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
        "other_group_sizes": graph.other_groups,
        "packed_bytes": graph.packed_bytes,
        "lossless_bytes": graph.lossless_bytes,
        "expert_bytes": graph.expert_bytes,
        "chosen_bytes": graph.chosen_bytes,
        "given_back_bytes": graph.paged_out_bytes,
        "token_bytes": graph.token_bytes,
        "fused": dict(Counter(f.rule for f in graph.fusions if not f.missed)),
        "missed": [
            {"rule": f.rule, "segment": f.segment, "reason": f.missed, "node": f.node}
            for f in graph.fusions
            if f.missed
        ],
        "captures": graph.captures.to_dict(),
        "processes": [dict(share) for share in graph.shares],
    }


def _twin_lines(record: ModelRecord, packed: Sequence[TwinWeight]) -> Iterator[str]:
    twins, refusal = record.of(TwinWeights), record.of(Statistics).own.refusal
    size = sum(p.nbytes for p in packed) / 1e6
    quantizers = ", ".join(sorted({p.quantizer for p in packed}))
    yield f"  packed         {len(packed)} matrices ({quantizers}), {size:.1f} MB, in {twins.packing_seconds:.1f} s"
    if twins.changes:
        yield f"    packed again {twins.changes} times after weights changed, {twins.changed} matrices the last time"
    for folder, count in Counter(p.folder for p in packed if p.folder).items():
        yield f"    saved twins  {count} matrices read from {folder}"
    for source, count in Counter(p.statistics for p in packed if p.statistics).items():
        yield f"    statistics   {count} matrices were calibrated on {source}"
    without = sum(p.asked != p.quantizer for p in packed)
    if without:
        why = f": the model wrote no text of its own ({refusal})" if refusal else ""
        yield f"    statistics   none for {without} matrices, which took quantizer={UNOBSERVED!r}{why}"
    if (loss := twins.loss.value) is not None:
        yield f"    loss         {loss}, all layers in 4 bits"
        if loss.large:
            yield "                 WARNING: high quantization loss. Early exit will change the output. Use"
            yield "                 quality='exact', tune_exit, or pass representative text as calibration_data="
    yield _sqnr_line("SQNR of weights", {p.name: p.sqnr for p in packed})
    observed = {p.name: p.output_sqnr for p in packed if p.output_sqnr is not None}
    if observed:
        yield _sqnr_line("SQNR of outputs", observed)


def _cache_lines(record: ModelRecord) -> Iterator[str]:
    prefixes = record.of(PrefixPool)
    size, texts = prefixes.bytes, prefixes.texts
    if size:
        yield f"  KV cache       {size / 1e6:.1f} MB of keys and values, kept for the next call of generate"
    if texts.texts or texts.reused:
        yield (
            f"  prefix cache   {texts.texts} sequences of {texts.tokens} tokens, {texts.saved_bytes / 1e6:.1f} MB "
            f"outside of the KV cache; {texts.reused} prompt tokens were reused"
        )


def _sqnr_line(title: str, decibels: Mapping[str, float]) -> str:
    finite = [db for db in decibels.values() if math.isfinite(db)]
    mean = sum(finite) / len(finite) if finite else math.inf
    name, least = min(decibels.items(), key=lambda item: item[1])
    first, *others = name.split("|")  # linears of one matmul share their path
    name = "|".join([first, *(path.rpartition(".")[2] for path in others)])
    return f"    {title}  mean {mean:.1f} dB, least {least:.1f} dB ({name})"


def _token_lines(report: Report) -> Iterator[str]:
    total, exact = sum(report.decode_depths.values()), report.exact
    steps = f"{total} decode steps, mean depth {report.mean_depth:.2f} layers" if total else "no decode step yet"
    yield f"  exits          {steps}"
    yield from histogram(report.decode_depths)
    if exact.cycles:
        yield f"  exact mode     {exact.cycles} verifying passes, {exact.emitted / exact.cycles:.2f} tokens per pass"
    for source, (drafted, accepted) in exact.by_source.items():
        yield f"    {source:<12} {100 * accepted / drafted:.0f} % of {drafted} drafted tokens were accepted"


def histogram(depths: Mapping[int, int], num_blocks: int | None = None) -> list[str]:
    """Return lines with a bar for each exit depth; `num_blocks` marks full depth."""
    total, most = sum(depths.values()), max(depths.values(), default=1)
    return [
        f"    depth {depth:>3}    {'#' * max(1, round(_BAR * n / most)):<{_BAR}} {n:>6} ({100 * n / total:.0f} %)"
        + ("  full depth" if depth == num_blocks else "")
        for depth, n in sorted(depths.items())
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _natural(name: str) -> list[object]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
