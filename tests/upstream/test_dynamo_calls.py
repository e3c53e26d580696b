"""Whether a call does more than to run its graph, by what Dynamo says."""

from __future__ import annotations

import pytest
import torch

from river_compile.upstream.dynamo import code_without_effects

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Kept:
    """Something that outlives the calls."""

    def __init__(self):
        self.count, self.flag, self.items = 0, False, []


KEPT = Kept()


def code_of(function, *arguments, seen=()):
    """Compiles a function; returns what was found of each graph while it was."""
    found = []

    def backend(graph, inputs):
        found.append(code_without_effects(seen))
        return graph

    torch.compile(function, backend=backend)(*arguments)
    return found


def only_computes(x):
    return x + 1


def resets_a_flag(x):
    KEPT.flag = False
    return x + 1


def counts(x):
    KEPT.count += 1
    return x + 1


def writes_to_an_argument(x, holder):
    holder.count = 3
    return x * 2


def grows_a_list(x, holder):
    holder.items.append(7)
    return x * 2


def test_code_that_changes_nothing_is_told_by_itself():
    assert code_of(only_computes, torch.zeros(2)) == [only_computes.__code__]
    assert code_of(resets_a_flag, torch.zeros(2)) == [resets_a_flag.__code__]


def test_an_argument_may_be_written_where_the_caller_looks_after_it():
    assert code_of(writes_to_an_argument, torch.zeros(2), Kept()) == [None]
    torch._dynamo.reset()
    assert code_of(writes_to_an_argument, torch.zeros(2), Kept(), seen=(Kept,)) == [writes_to_an_argument.__code__]


@pytest.mark.parametrize("function", [counts, grows_a_list])
def test_what_stays_changed_is_noticed(function):
    arguments = (Kept(),) if function is grows_a_list else ()
    assert code_of(function, torch.zeros(2), *arguments) == [None]
