"""What Dynamo says that a call does besides running its graph."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from river_compile.upstream.dynamo_calls import CallEffects, effects_of_call

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Kept:
    """Something that outlives the calls."""

    def __init__(self):
        self.count = 0


KEPT = Kept()


def effects_of(function, *arguments) -> list[CallEffects | None]:
    """Compiles a function; returns what was seen of its effects while it was."""
    seen = []

    def backend(graph, inputs):
        seen.append(effects_of_call(()))
        return graph

    torch.compile(function, backend=backend)(*arguments)
    return seen


def test_attributes_of_what_does_not_come_with_the_arguments_are_named():
    def counts(x):
        KEPT.count += 1
        return x + 1

    (effects,) = effects_of(counts, torch.zeros(2))
    assert [(owner(), name) for owner, name in effects.written] == [(KEPT, "count")]


def test_what_cannot_be_looked_for_is_told_from_nothing():
    """A list that comes with the arguments grows by a tensor, or by a number: nobody looks at it."""

    def grows(x, holder, more):
        holder.items.append(x + 1 if more is None else more)
        return x * 2

    assert [e.written for e in effects_of(lambda x: x + 1, torch.zeros(2))] == [()]
    for more in (None, 7):
        for first in ([], [torch.ones(2)]):
            assert effects_of(grows, torch.zeros(2), SimpleNamespace(items=list(first)), more) == [None]
