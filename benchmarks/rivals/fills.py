"""Fills: what stands in for the KV entries of the blocks that a token skipped.

==========  =================================================  ==================================================
fill        after its exit a token runs                        a later token reads
==========  =================================================  ==================================================
river       the 4-bit twins                                    the twins' entries
propagate   the blocks' K and V projections, of the hidden     these entries (CALM, ELLM)
            state that left
recompute   nothing; slots stay empty                          the block's own entries: when it needs a block, the
                                                               skipped tokens run through it with it (EE-LLM)
mask        nothing                                            what is there; the rest is masked out (D-LLM)
monotone    nothing                                            what is there: it runs no block that was skipped once
                                                               (SkipDecode)
==========  =================================================  ==================================================

"river" is the package's. The others are its rivals and pay as their methods do; the last three leave holes in the cache
and must know where (:mod:`benchmarks.rivals.holes`).

Not handled: doubt, prompts that leave, captures, offloading, exact mode and several devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks.rivals.entries import kv_entries
from benchmarks.rivals.holes import Gaps, Holes
from benchmarks.rivals.mask import Mask
from benchmarks.rivals.recompute import Recompute
from river_compile import river
from river_compile.passes.pipeline import Pass
from river_compile.runtime.fill import Fill


class Propagate(Fill):
    """The hidden state that left goes through the later blocks' K and V projections."""

    name = "propagate"

    @classmethod
    def passes(cls, candidates: tuple[int, ...]) -> list[Pass]:
        return [kv_entries(empty=False)]


class Monotone(Holes):
    """No token runs deeper than the one before it: what is missing is never read."""

    name = "monotone"

    def limit(self, gaps: Gaps) -> int:
        return gaps.depths[-1] if gaps.depths else self.num_blocks


RIVALS: dict[str, type[Fill]] = {fill.name: fill for fill in (Propagate, Recompute, Mask, Monotone)}
# What they do not have: they keep count of every token on the host, and their blocks are no longer those that the
# package's kernels know.
OPTIONS = {"cudagraphs": False, "backbone": "model"}


def backend(name: str) -> Callable:
    """Returns the backend with a rival's fill, to be used with `OPTIONS`."""
    return functools.partial(river, fill=RIVALS[name])
