"""Distinguishes decode steps that continue a sequence from those that begin one.

A step goes on where it brings the cache that the thread's latest decode step left, the same tensor with no change in
place since that PyTorch counts. A prompt in between makes the next step a beginning. So do beams that swap rows and
caches that are cut: too many beginnings cost a look each (`twins/registry.py`).

Not handled: a static cache made under ``torch.inference_mode()`` that comes back for a prompt of one token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from river_compile.upstream.tensors import version_of


class SequenceTracker(threading.local):
    """The latest sequence of one model, in each thread."""

    def __init__(self) -> None:
        self._left: tuple[TensorWeakRef, int] | None = None
        self._seen: set[object] | None = None

    def begins(self, graph: object, cache: Tensor | None) -> bool:
        """Tells whether a step of a graph, which gets this tensor of the cache, is the first one of a sequence."""
        if self._seen is not None:
            new = graph not in self._seen
            self._seen.add(graph)
            return new
        left = self._left
        return cache is None or left is None or left[0]() is not cache or left[1] != version_of(cache)

    @property
    def goes_on(self) -> bool:
        """Whether every step now belongs to one sequence, prompts too; see :meth:`one`."""
        return self._seen is not None

    def left(self, cache: Tensor | None) -> None:
        """Notes the tensor of the cache that a decode step left, None after a prompt."""
        self._left = None if cache is None else (TensorWeakRef(cache), version_of(cache))

    @contextmanager
    def one(self) -> Iterator[None]:
        """Takes all steps of its body for one sequence, for loops that cut the cache and verify whole drafts."""
        self._seen = set()
        try:
            yield
        finally:
            self._seen = self._left = None
