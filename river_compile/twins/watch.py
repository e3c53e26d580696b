"""Sees to it that a graph's twins are those of its parameters, at the beginning of every sequence.

Parameters are inputs of the graph, so that those which somebody put in place of others are seen too. Where all look as
they did (`sources.py`), that takes a millisecond for 200 matrices; otherwise their digests decide, and what changed is
packed again in the tensors that compiled code and captured graphs hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from river_compile.distributed.ranks import Ranks
from river_compile.passes.program import LinearSite
from river_compile.state import ModelState, adopt

from .make import PackedSite
from .pack import PackedWeights, Statistics
from .sources import Looks, Sources


class TwinWatch:
    """Looks after the twins of one graph.

    Args:
        packed: its packed products.
        slots: the index of each of the graph's inputs.
        state: of the model, with its packed weights and what was observed.
    """

    def __init__(
        self, packed: Mapping[LinearSite, PackedSite], slots: Mapping[fx.Node, int], state: ModelState
    ) -> None:
        self._sites = [(made, site) for site, made in packed.items()]
        nodes = [node for site in packed for node in (*site.weights, *site.biases, *site.folds) if node is not None]
        self._slots = {node: slots[node] for node in nodes}
        self._order = [slots[node] for node in nodes]
        self._state = state
        self._look()

    def __call__(self, args: Sequence[Any]) -> None:
        """Packs those products again that do not stand for the parameters among the graph's inputs."""
        if self._state.of(Ranks).every(self._looks == Looks([args[i] for i in self._order])):
            return
        values = {node: args[i] for node, i in self._slots.items()}
        adopt(self._state, values.values())
        pairs = [(made, Sources.of(site, values)) for made, site in self._sites]
        self._state.of(PackedWeights).renew(pairs, Statistics.of(self._state))
        self._look()

    def _look(self) -> None:
        """Notes how the products' parameters looked when they were packed, or last compared."""
        self._looks = Looks.together(made.looks for made, _ in self._sites)
