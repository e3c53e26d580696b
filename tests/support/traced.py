"""A decode step, traced once for a family and rewritten many times without Dynamo: a tenth of a second each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from river_compile.backend import river
from river_compile.exits import forced_depth
from river_compile.twins.weights import TwinWeight
from tests.support.decoding import cache_argument, new_cache, run_plainly
from tests.support.families import VOCABULARY, make, prompt
from tests.support.lowerings import INDUCTOR, OPERATORS


def dequantized(model: nn.Module, sites: Iterable[TwinWeight]) -> dict[str, Tensor]:
    """Returns what twins multiply by in place of the weights, by parameter name, in the model's dtype."""
    named = dict(model.named_parameters())
    weights = {}
    for site in sites:
        names = [site.name] if site.matmul.experts else [f"{name}.weight" for name in site.name.split("|")]
        for part, name in zip(site.dequantize().split(site.matmul.out_features), names, strict=True):
            part = part.view(site.matmul.experts, -1, site.matmul.in_features) if site.matmul.experts else part
            weights[name] = (part.mT if site.matmul.transposed else part).to(named[name].dtype)
    return weights


class Trace(NamedTuple):
    """What Dynamo made of a step of a family: every model of that family runs it, on its own inputs.

    Attributes:
        inputs: a value for each input of the graph; those that are named or cached are each model's own.
        names: of the inputs that are parameters or buffers, by the input's number.
        cached: of the inputs that lie in the cache, the layer and its attribute, by the input's number.
    """

    graph: torch.fx.GraphModule
    inputs: list[Any]
    names: dict[int, str]
    cached: dict[int, tuple[int, str]]


@torch.no_grad()
def _prompted(model: nn.Module) -> Any:
    """Returns a static cache with a prompt of nine tokens in it."""
    cache = new_cache(model, "static")
    held = {"use_cache": True, cache_argument(model): cache}
    run_plainly(model, input_ids=prompt(9), position_ids=torch.arange(9)[None], **held)
    return cache


@functools.cache
@torch.inference_mode(False)
@torch.no_grad()
def _trace(family: str, layers: int, experts: str | None) -> Trace:
    model, traced = make(family, layers=layers, experts=experts), []
    cache = _prompted(model)

    def keep(graph, inputs):
        names = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
        places = {id(t): (i, key) for i, layer in enumerate(cache.layers) for key, t in vars(layer).items()}
        found = [{n: known[id(x)] for n, x in enumerate(inputs) if id(x) in known} for known in (names, places)]
        values = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        traced.append(Trace(graph, values, *found))
        return graph.forward

    step = torch.compile(model.forward, backend=keep)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # (whatever was traced before)
        step(prompt(1, seed=1), position_ids=torch.tensor([[9]]), use_cache=True, **{cache_argument(model): cache})
    (trace,) = traced
    return trace


class TracedStep:
    """One token after a prompt of nine, on a static cache that every run finds as the prompt left it.

    Args:
        family: see `tests.support.families`.
        seed: of the weights.
        layers: number of decoder blocks.
        experts: as `tests.support.families.make` takes it.
        model: in the place of one that is made from these.
    """

    def __init__(
        self,
        family: str = "llama",
        seed: int = 0,
        layers: int = 2,
        experts: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.model = make(family, layers=layers, seed=seed, experts=experts) if model is None else model
        self._graph, self._inputs, self._names, cached = _trace(family, layers, experts)
        cache = _prompted(self.model)
        self._cached = {n: getattr(cache.layers[layer], key) for n, (layer, key) in cached.items()}

    @torch.no_grad()
    def run(self, depth: int = 0, **options) -> Tensor:
        """Rewrites the step with these options, leaves after `depth` blocks and returns the logits ``[1, 1, V]``."""
        return self.run_on(self.inputs(), depth, **options)

    @torch.no_grad()
    def run_on(self, inputs: list, depth: int = 0, **options) -> Tensor:
        """Like `run`, on inputs of the caller."""
        settings = {"kernels": OPERATORS, "group_size": 32, "first_exit": 1, "threshold": -1.0}
        executor = river(self._graph, inputs, options={**settings, **options})
        with forced_depth(depth):
            return _logits(executor(*inputs))

    @torch.no_grad()
    def compiled(self, **options) -> Callable:
        """Rewrites the step with these options."""
        settings = {"kernels": OPERATORS, "group_size": 32, "first_exit": 1, "threshold": -1.0}
        return river(self._graph, self.inputs(), options={**settings, **options})

    @torch.no_grad()
    def call(self, executor: Callable, depth: int = 0) -> Tensor:
        """Runs the rewritten step, which leaves after `depth` blocks, with the model's parameters as they are."""
        with forced_depth(depth):
            return _logits(executor(*self.inputs()))

    def inputs(self) -> list:
        """Returns the graph's inputs: the model's tensors as they are, and a cache as the prompt left it."""
        return self._fresh({})

    def written(self, **options) -> dict[int, Tensor]:
        """Runs the step (see `run`) and returns what it wrote to, by the input's number."""
        inputs, before = self.inputs(), self.inputs()
        self.run_on(inputs, **options)
        tensors = {i: value for i, value in enumerate(inputs) if isinstance(value, Tensor)}
        return {i: value for i, value in tensors.items() if not torch.equal(value, before[i])}

    @torch.no_grad()
    def rewrite(self, mode: str) -> None:
        """Rewrites the step as ``torch.compile(mode=...)`` has it done, every segment through Inductor."""
        river(self._graph, self.inputs(), options={"kernels": INDUCTOR}, mode=mode)

    @torch.no_grad()
    def reference(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Runs the step as it was traced, with some parameters replaced by name."""
        return _logits(self._graph(*self._fresh(weights)))

    def _fresh(self, replaced: Mapping[str, Tensor]) -> list:
        """Returns inputs of which those that a step writes to are copies, some of the model's tensors replaced."""
        own = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        values = [x.clone() if isinstance(x, Tensor) else x for x in self._inputs]
        for number, name in self._names.items():
            values[number] = replaced.get(name, own[name])
        for number, value in self._cached.items():
            values[number] = value.clone() if isinstance(value, Tensor) else value
        return values


def _logits(outputs) -> Tensor:
    return next(x for x in outputs if isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == VOCABULARY)
