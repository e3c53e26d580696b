"""What other modes promise: fast with unquantized twins is the plain model; drafts change no bit of bfloat16."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

import river_compile
from river_compile.exits import forced_depth
from tests.peer.conftest import DRAFTING, LAYERS
from tests.peer.test_calls import FAMILIES
from tests.support.families import REFUSED, make
from tests.support.lowerings import UNQUANTIZED
from tests.support.peer import DRAFTS, STEPS, Peers
from tests.support.peer_cases import ASSISTANTS, CASES

ALL_DEPTHS = range(LAYERS + 1)
IN_STEPS = [name for name, case in CASES.items() if case.does in (DRAFTS, STEPS) and case.name != "inputs"]
FEW = ("greedy", "do_sample", "batch", "repetition_penalty")
QUICK = [*(("llama", name) for name in FEW), ("gpt2", "greedy")]  # (its first step is traced apart from its prompt)


@pytest.fixture(scope="module")
def fast() -> Iterator[Callable[[str], Peers]]:
    """Returns a family's plain model and one whose tokens may exit anywhere, to twins that are not quantized."""

    @functools.lru_cache(maxsize=1)
    def of_family(family: str) -> Peers:
        options = {"kernels": UNQUANTIZED, "first_exit": 1, "compile_cache": False}
        ours = river_compile.accelerate(make(family, layers=LAYERS), quality="fast", **options)
        models = Peers(make(family, layers=LAYERS), ours)
        models.drafts = False
        models.compiles = family not in REFUSED
        return models

    return of_family


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for name in (IN_STEPS if family == "llama" else FEW)
    ],
)
def test_fast_at_each_depth_is_transformers_own(family, name, fast):
    """Every token exits after 0, 1 ... all layers."""
    models = fast(family)
    for depth in ALL_DEPTHS:
        with forced_depth(depth):
            trace = models.compare(CASES[name])
        assert {step.depth for step in trace.tokens} <= {depth}
        assert trace.tokens or not models.compiles or len(trace.steps) < 2


@pytest.fixture(scope="module")
def bits() -> Callable[[str], Peers]:
    """Returns a family in bfloat16 accelerated without drafts, and with them."""

    @functools.lru_cache(maxsize=1)
    def of_family(family: str) -> Peers:
        models = Peers(
            *(
                river_compile.accelerate(make(family, torch.bfloat16, layers=LAYERS), **{**DRAFTING, **options})
                for options in ({"kernels": "auto", "num_assistant_tokens": 0}, {"kernels": "auto"})
            )
        )
        models.tolerance = 0.0
        return models

    return of_family


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "name",
    [name for name in IN_STEPS if CASES[name] not in ASSISTANTS and CASES[name].does == DRAFTS],
)
def test_drafts_change_no_bit_of_bfloat16(family, name, bits):
    """Ids, scores, logits and cache, by River's own kernels."""
    bits(family).compare(CASES[name])
