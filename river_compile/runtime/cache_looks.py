"""What compiled code depends on of a KV cache: its layers' attributes, and the tokens that sliding windows count.

A static sliding window counts its tokens in Python, so each step changes an attribute of it, and Dynamo hands the count
to the graph. While no window is full, or all are, nothing that a graph computes depends on the count itself.

Not handled (`CacheLooks.lasting` is False): steps in which a window becomes full, windows of which some are full, other
layers that count in Python.
"""

from __future__ import annotations

from typing import Any

from torch._C._dynamo.guards import dict_version
from transformers.cache_utils import StaticSlidingWindowLayer

_COUNT = "cumulative_length_int"
_MANY = -1


class CacheLooks:
    """How a cache looks before a step.

    Args:
        cache: of transformers.
        width: tokens of each row that the step writes.

    Attributes:
        count: as `count_of`.
        lasting: whether a step that meets these looks leaves them, but for the counts, so that another one may follow.
    """

    def __init__(self, cache: Any, width: int) -> None:
        windows = _windows_of(cache)
        self._width, self._full = width, _full(windows, 1)
        self.count = count_of(cache)
        self.lasting = self.count != _MANY and len(self._full) <= 1 and self._full == _full(windows, width)
        self._versions, self._attributes = _versions_of(cache), _attributes_of(windows)

    def unchanged(self, cache: Any) -> bool:
        """Returns whether no attribute of it was set since, but for the counts."""
        return _versions_of(cache) == self._versions and _attributes_of(_windows_of(cache)) == self._attributes

    def again(self, cache: Any) -> bool:
        """Returns whether windows are as full before and after another step of as many tokens."""
        windows = _windows_of(cache)
        return _full(windows, 1) == _full(windows, self._width) == self._full

    def has_counted(self, cache: Any) -> bool:
        """Returns whether the windows counted this step's tokens, and nothing else."""
        return self.count is None or count_of(cache) == self.count + self._width

    def let_count(self, cache: Any) -> None:
        """Counts the tokens of one more step."""
        for layer in _windows_of(cache):
            layer.cumulative_length_int += self._width


def count_of(cache: Any) -> int | None:
    """Returns how many tokens the static sliding windows have counted: None without windows, -1 where they differ."""
    counts = {vars(layer)[_COUNT] for layer in _windows_of(cache)}
    return _MANY if len(counts) > 1 else next(iter(counts), None)


def _windows_of(cache: Any) -> list:
    return [layer for layer in cache.layers if type(layer) is StaticSlidingWindowLayer]


def _full(windows: list, tokens: int) -> set[bool]:
    """Returns which of both occur: windows that lack room for so many more tokens, and such that do not."""
    return {vars(layer)[_COUNT] + tokens > layer.max_cache_len for layer in windows}


def _versions_of(cache: Any) -> list[int]:
    others = (layer for layer in cache.layers if type(layer) is not StaticSlidingWindowLayer)
    return [dict_version(vars(kept)) for kept in (cache, *others)]


def _attributes_of(windows: list) -> list:
    """(By identity. Their tensors are looked at again where a step takes them.)"""
    return [[(name, id(value)) for name, value in vars(layer).items() if name != _COUNT] for layer in windows]
