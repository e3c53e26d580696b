"""Pairs of models that a file's tests share: tracing takes longer than all calls that follow."""

from collections.abc import Callable, Iterator

import pytest
import torch

import river_compile
from tests.support.families import REFUSED, make
from tests.support.lowerings import OPERATORS
from tests.support.peer import Peers

LAYERS = 2
# Calls that need not draft: OPT's code breaks the graph of a prompt of embeddings.
BREAKS = {"opt": ("inputs_embeds", "inputs_embeds and ids")}
# Twins of few bits and short drafts, so that some are accepted and some are not; nothing depends on time.
DRAFTING = {
    "quantizer": "rtn", "group_size": 32, "kernels": OPERATORS, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant", "compile_cache": False, "background_packing": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _graphs_for_every_call() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.fixture(autouse=True)
def _dynamo_of_a_slow_test() -> None:
    """In place of the one that forgets all graphs: here slow tests share theirs, as the default ones do."""


def pair(family: str, **options: object) -> Peers:
    """Returns a family's plain model and one accelerated in exact mode, which no call has seen."""
    ours = river_compile.accelerate(make(family, layers=LAYERS), **{**DRAFTING, **options})
    peers = Peers(make(family, layers=LAYERS), ours)
    peers.compiles, peers.breaks = family not in REFUSED, BREAKS.get(family, ())
    return peers


@pytest.fixture(scope="module")
def peers() -> Callable[[str], Peers]:
    """Returns the pair of a family: the last test's, unless that one failed."""
    kept: dict[str, Peers] = {}

    def of_family(family: str) -> Peers:
        if family not in kept or kept[family].broken:
            kept.clear()
            kept[family] = pair(family)
        return kept[family]

    return of_family
