"""What River makes of one family: the backend at every exit depth with both caches, and `accelerate`.

Twins are unquantized and segments run operator by operator, so that only rounding may separate the two. What is
compared is `generate` itself, fed with the plain model's tokens: each step's logits, the token that they choose, and
that every step left at the depth that it should leave at.

Not handled: other batches than two left-padded rows; training; devices other than a CPU.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import river_compile
from river_compile.backend import river
from river_compile.exits import forced_depth
from river_compile.kernels.quant.layouts import PLAIN_LAYOUT
from river_compile.passes.program import Lowering
from river_compile.reporting.report import Fallbacks
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.state import on_step

from .tiny import VOCABULARY, tiny_model

NEW_TOKENS = 6
TOLERANCE = 1e-4  # of logits whose spread is about one; more only where the plain model's own rounding is more
CACHES = ("static", "dynamic")
UNQUANTIZED = {"kernels": Lowering("eager", None, fuse=False), "first_exit": 1}
TWINS = {"kernels": Lowering("eager", PLAIN_LAYOUT, fuse=False), "quantizer": "rtn", "group_size": 32}
FOUR_BITS = {**TWINS, "first_exit": 1}
DRAFTED, UNDRAFTED, PLAIN = "drafts", "no drafts", "plain"


@dataclass
class Outcome:
    """What was found out about a model type.

    Attributes:
        result: "rewritten", "partly in 16 bits", "refused", "cannot be built", or "failed": wrong, crashed or hung.
        reason: why, for all but "rewritten".
        depths: exit depths that were equal, for each cache that transformers can use with the model.
        without: why a cache was not used or its graph not rewritten, for each such cache.
        difference: largest difference of any logit.
        products: 4-bit products for each block.
        kept: what stays in 16 bits: reason -> names of matrices.
        exact: how `accelerate` gave the plain text: "drafts", "no drafts: why", "plain: why" where transformers' loop
            ran; "" where it was not asked.
    """

    model_type: str
    result: str = "failed"
    reason: str = ""
    depths: dict[str, list[int]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0
    products: float = 0.0
    kept: dict[str, list[str]] = field(default_factory=dict)
    exact: str = ""
    seconds: float = 0.0
    sources: str = ""


class Wrong(Exception):
    """River's text or logits differ from the plain model's, or it did not run although it should have."""


def check(
    model_type: str,
    exact: bool = False,
    caches: Sequence[str] = CACHES,
    build: Callable[[str], PreTrainedModel] = tiny_model,
) -> Outcome:
    """Build a tiny model, compare it with River and reports. Raises nothing that an `Outcome` can hold."""
    outcome = Outcome(model_type)
    try:
        model = build(model_type)
        plain = {kind: generated(model, kind) for kind in caches}
        del model
        if all(isinstance(run, str) for run in plain.values()):
            outcome.result, outcome.reason = "cannot be built", str(plain[caches[-1]])
            return outcome
    except Exception as error:  # (whatever transformers raises for a config that it cannot build)
        outcome.result, outcome.reason = "cannot be built", message(error)
        return outcome
    traced: Traced | None = None
    try:
        for kind, expected in plain.items():
            if isinstance(expected, str):
                outcome.without[kind] = f"transformers cannot: {expected}"
            else:
                traced = compare(outcome, partial(build, model_type), kind, expected) or traced
        if traced is not None:
            traced.describe_twins(outcome)
            outcome.result = "partly in 16 bits" if outcome.kept else "rewritten"
        else:
            by_cache = [f"{kind}: {why}" for kind, why in outcome.without.items()]
            same = len(set(outcome.without.values())) == 1
            outcome.result, outcome.reason = (
                "refused",
                next(iter(outcome.without.values())) if same else "; ".join(by_cache),
            )
        if exact:
            outcome.exact = accelerated(build(model_type))
    except Exception as error:  # (a crash of any kind is what is looked for)
        outcome.result, outcome.reason = "failed", message(error)
        traceback.print_exc()
    return outcome


def message(error: BaseException) -> str:
    """Return an error's kind and first line."""
    error = getattr(error, "inner_exception", error)  # (Dynamo wraps what a backend raises)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:240]


@dataclass(frozen=True)
class Generated:
    """Tokens ``[2, NEW_TOKENS]`` and the logits ``[NEW_TOKENS, 2, V]`` that chose them."""

    tokens: Tensor
    logits: Tensor


class _Say(LogitsProcessor):
    """Makes greedy decoding say given tokens, step after step."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = iter(tokens.unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(1, next(self._tokens)[:, None], 0.0)


def prompt() -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[2, 10]``, the second row with three padding tokens before it."""
    ids = torch.randint(3, VOCABULARY - 2, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return ids, mask


def generated(model: PreTrainedModel, kind: str) -> Generated | str:
    """Generate with the plain model; return the error's text where transformers cannot."""
    try:
        found = say(model, kind)
    except Exception as error:  # (a cache that transformers cannot use with this model)
        return message(error)
    if not found.logits.isfinite().all() or found.logits.std(-1).mean() < 0.02:
        return "the tiny model's logits are degenerate"
    return found


@torch.no_grad()
def say(model: PreTrainedModel, kind: str, tokens: Tensor | None = None) -> Generated:
    """Generate with a cache, greedily or the given tokens."""
    ids, mask = prompt()
    cache = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
        logits_processor=LogitsProcessorList([] if tokens is None else [_Say(tokens)]),
        output_logits=True, return_dict_in_generate=True, **cache,
    )  # fmt: skip
    return Generated(out.sequences[:, ids.shape[1] :], torch.stack(out.logits))


def compare(outcome: Outcome, build: Callable[[], PreTrainedModel], kind: str, expected: Generated) -> Traced | None:
    """Note the depths that were equal with a cache, or why River did not run; return the decode step if it did.

    Raises:
        Wrong: anything else.
    """
    fresh()
    model = build()
    model.compile(backend=(traced := Traced(model)))
    blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    for depth in dict.fromkeys((blocks, 0, blocks // 2, blocks - 1)):
        with warnings.catch_warnings(), forced_depth(depth), on_step(left := Left()):
            warnings.simplefilter("ignore")
            actual = say(model, kind, expected.tokens)
        difference = (actual.logits - expected.logits).abs().max().item()
        outcome.difference = max(outcome.difference, difference)
        if not difference <= TOLERANCE and not difference <= rounding(build(), kind, expected):
            raise Wrong(f"{kind} cache, depth {depth}: logits differ by {difference:.2g}")
        if left.prompts > 1:
            outcome.without[kind] = (
                f"{left.prompts - 1} of {NEW_TOKENS - 1} steps ran in a graph for prompts, whose tokens do not leave: "
                "the model's code gets the whole text in every step"
            )
            return None
        if not left.depths:
            reasons = [graph.refusal for graph in river_compile.report(model).graphs if graph.refusal]
            if not reasons:
                raise Wrong(f"{kind} cache: no step reached River, and the report does not say why")
            outcome.without[kind] = next((reason for reason in reasons if "broke the graph" in reason), reasons[-1])
            return None
        if left.depths != {depth: NEW_TOKENS - 1}:
            raise Wrong(f"{kind} cache, depth {depth}: decode steps left at {dict(left.depths)}")
        outcome.depths.setdefault(kind, []).append(depth)
    outcome.depths[kind].sort()
    return traced


def rounding(model: PreTrainedModel, kind: str, expected: Generated) -> float:
    """Return how far the plain model's logits are from what it gives in float64."""
    return (say(model.double(), kind, expected.tokens).logits - expected.logits).abs().max().item()


class Traced:
    """A backend: River with unquantized twins, which keeps the first decode step to rewrite it in another way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._graph: fx.GraphModule | None = None
        self._inputs: list = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: list) -> Callable:
        step = river(graph_module, example_inputs, options=UNQUANTIZED)
        decodes = isinstance(step, RiverExecutor) and step.decodes
        if self._graph is not None or not decodes:
            return step
        self._graph = graph_module

        def keeping(*args):
            if not self._inputs:
                self._inputs = [self._copy(x) for x in args]
            return step(*args)

        return keeping

    def _copy(self, x: object) -> object:
        """Return what a step may write to as a copy, weights as they are."""
        weights = {p.data_ptr() for p in self._model.parameters()}
        return x if not isinstance(x, Tensor) or x.data_ptr() in weights else x.clone()

    @torch.no_grad()
    def describe_twins(self, outcome: Outcome) -> None:
        """Note the 4-bit products and what stays in 16 bits, and run the step through quantized twins.

        Raises:
            Wrong: they give values that are not finite.
        """
        assert self._graph is not None
        step = river(self._graph, self._inputs, options=FOUR_BITS)
        with forced_depth(0):
            outputs = step(*self._inputs)
        if not all(x.isfinite().all() for x in outputs if isinstance(x, Tensor) and x.dim() == 3):
            raise Wrong("4-bit twins give values that are not finite")
        report = river_compile.report(self._model)
        for kept in report.graphs[-1].kept:
            outcome.kept.setdefault(kept.reason, []).append(kept.name)
        outcome.products = round(len(report.packed) / report.graphs[-1].num_blocks, 2)


class Left:
    """Counts the exit depths of decode steps, and the steps that ran as prompts."""

    def __init__(self) -> None:
        self.depths: Counter[int] = Counter()
        self.prompts = 0

    def __call__(self, state, step) -> None:
        if step.decode:
            self.depths[step.depth] += 1
        else:
            self.prompts += 1


def accelerated(model: PreTrainedModel) -> str:
    """Return how an accelerated model gave the plain text: `DRAFTED`, or `UNDRAFTED` or `PLAIN` with the reason.

    Raises:
        Wrong: it gives another text.
    """
    fresh()
    ids = prompt()[0][:1]
    options = {"max_new_tokens": 2 * NEW_TOKENS, "do_sample": False}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = model.generate(ids, **options)
        river_compile.accelerate(model, **TWINS, compile_cache=False, background_packing=False)
        actual = model.generate(ids, **options)
    if not torch.equal(actual, expected):
        raise Wrong("the accelerated model gives another text than the plain one")
    report = river_compile.report(model)
    if report.exact.cycles:
        return DRAFTED
    reasons = "; ".join(report.record.of(Fallbacks)) or "no reason is known"
    return f"{UNDRAFTED if report.decode_depths else PLAIN}: {reasons}"


def fresh() -> None:
    """Forget what was compiled before."""
    torch._dynamo.reset()
    gc.collect()
