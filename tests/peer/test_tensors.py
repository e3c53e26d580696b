"""Tensors that some families' forwards take besides ids and masks: present in one call, absent from the next.

What one call left, graphs and states and the prefix cache, must not serve another one whose tensors it does not read.
"""

import pytest
import torch

import river_compile
from tests.peer.conftest import DRAFTING
from tests.support.peer import ANY, Case, Peers
from tests.support.peer_cases import LENGTH, text
from tools.families.tiny import tiny_model

TAKEN = [
    ("gpt2", "token_type_ids"),
    *((family, "token_type_ids") for family in ("gpt_bigcode", "gpt_neo", "gptj", "codegen", "ctrl", "openai-gpt")),
    *((family, "token_type_ids") for family in ("bert", "big_bird", "electra", "megatron-bert", "roberta", "xlm")),
    *(("ernie", name) for name in ("token_type_ids", "task_type_ids")),
    ("roc_bert", "token_type_ids"),  # (its other two tensors fail in transformers' second pass)
]
FIRST_WITHOUT = "first without"
ORDERS = {
    FIRST_WITHOUT: ("without", "with", "without", "with others"),
    "first with": ("with", "without", "with others", "with"),
}


def of(name: str, kind: str) -> Case:
    """Returns a call without the tensor, with one, or with other values in it."""
    numbers = {"with": torch.arange(LENGTH) % 2, "with others": torch.ones(LENGTH, dtype=torch.long)}
    extra = {} if kind == "without" else {name: numbers[kind][None]}
    return Case(f"{name}: {kind}", lambda _: {**text(), **extra}, ANY)


@pytest.mark.parametrize(
    ("family", "name", "order"),
    [
        pytest.param(*taken, order, marks=() if (taken[0], order) == ("gpt2", FIRST_WITHOUT) else pytest.mark.slow)
        for taken in TAKEN
        for order in ORDERS
    ],
)
def test_calls_with_and_without_a_tensor_follow_each_other(family, name, order):
    models = Peers(tiny_model(family), river_compile.accelerate(tiny_model(family), **DRAFTING))
    for kind in ORDERS[order]:
        models.compare(of(name, kind))
        models.compare(of(name, kind), fields=False)
