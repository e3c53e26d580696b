"""A decode step traced once and rewritten many times, without Dynamo in between: a tenth of a second each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from river_compile import river
from river_compile.exits import forced_depth
from river_compile.lowering.choose import Lowering
from river_compile.twins.make import PackedSite
from tests.support.decoding import cache_argument, new_cache
from tests.support.families import VOCABULARY, make, prompt


def dequantized(model: nn.Module, sites: Iterable[PackedSite]) -> dict[str, Tensor]:
    """Returns what twins multiply by in place of the weights, by parameter name, in the model's dtype."""
    named = dict(model.named_parameters())
    weights = {}
    for site in sites:
        names = [site.name] if site.experts else [f"{name}.weight" for name in site.name.split("|")]
        for part, name in zip(site.dequantize().split(site.out_features), names, strict=True):
            part = part.view(site.experts, -1, site.in_features) if site.experts else part
            weights[name] = (part.mT if site.transposed else part).to(named[name].dtype)
    return weights


class TracedStep:
    """One token after a prompt of nine, on a static cache that every run finds as the prompt left it.

    Args:
        family: see `tests.support.families`.
        seed: of the weights.
        layers: number of decoder blocks.
        experts: as `tests.support.families.make` takes it.
    """

    def __init__(self, family: str = "llama", seed: int = 0, layers: int = 2, experts: str | None = None) -> None:
        self.model = make(family, layers=layers, seed=seed, experts=experts)
        self._names = {p: name for name, p in self.model.named_parameters()}
        cache = new_cache(self.model, "static")
        held = {"use_cache": True, cache_argument(self.model): cache}
        torch._dynamo.reset()
        with torch.no_grad():
            self.model(input_ids=prompt(9), position_ids=torch.arange(9)[None], **held)
            step = torch.compile(self.model.forward, backend=self._keep)
            step(input_ids=prompt(1, seed=1), position_ids=torch.tensor([[9]]), **held)

    @torch.no_grad()
    def run(self, depth: int = 0, lowering: Lowering | None = None, **options) -> Tensor:
        """Rewrites the step with these options, leaves after `depth` blocks and returns the logits ``[1, 1, V]``.

        `lowering` takes the place of the one that the options choose.
        """
        return self.run_on(self.inputs(), depth, lowering, **options)

    @torch.no_grad()
    def run_on(self, inputs: list, depth: int = 0, lowering: Lowering | None = None, **options) -> Tensor:
        """Like `run`, on inputs of the caller."""
        settings = {"lowering": "eager", "group_size": 32, "first_exit": 1, "threshold": -1.0}
        executor = river(self._graph, inputs, options={**settings, **options}, lowering=lowering)
        with forced_depth(depth):
            return _logits(executor(*inputs))

    @torch.no_grad()
    def compiled(self, **options) -> Callable:
        """Rewrites the step with these options."""
        settings = {"lowering": "eager", "group_size": 32, "first_exit": 1, "threshold": -1.0}
        return river(self._graph, self.inputs(), options={**settings, **options})

    @torch.no_grad()
    def call(self, executor: Callable, depth: int = 0) -> Tensor:
        """Runs the rewritten step, which leaves after `depth` blocks, with the model's parameters as they are."""
        with forced_depth(depth):
            return _logits(executor(*self.inputs()))

    def inputs(self) -> list:
        """Returns the graph's inputs, with the model's parameters as they are and a cache as the prompt left it."""
        current = dict(self.model.named_parameters())
        return self._fresh({p: current[name] for p, name in self._names.items()})

    def written(self, **options) -> dict[int, Tensor]:
        """Runs the step (see `run`) and returns what it wrote to, by the input's number."""
        inputs, before = self.inputs(), self.inputs()
        self.run_on(inputs, **options)
        tensors = {i: value for i, value in enumerate(inputs) if isinstance(value, Tensor)}
        return {i: value for i, value in tensors.items() if not torch.equal(value, before[i])}

    @torch.no_grad()
    def rewrite(self, mode: str) -> None:
        """Rewrites the step as ``torch.compile(mode=...)`` has it done, every segment through Inductor."""
        river(self._graph, self._fresh({}), options={"lowering": "inductor"}, mode=mode)

    @torch.no_grad()
    def reference(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Runs the step as it was traced, with some parameters replaced by name."""
        return _logits(self._graph(*self._fresh({p: weights[n] for p, n in self._names.items() if n in weights})))

    def _keep(self, graph_module, example_inputs):
        self._graph, self._inputs = graph_module, list(example_inputs)
        self._inputs = self._fresh({})
        return graph_module.forward

    def _fresh(self, replaced: Mapping[Tensor, Tensor]) -> list:
        """Returns inputs of which those that a step writes to are copies."""

        def copy(value):
            if isinstance(value, Tensor) and value not in self._names:
                return value.clone()
            return replaced.get(value, value)

        return [copy(value) for value in self._inputs]


def _logits(outputs) -> Tensor:
    return next(x for x in outputs if isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == VOCABULARY)
