"""How many bytes of a segment's inputs one token reads: of stacked experts only those that its router chose.

Not handled: several tokens at once, which may choose different experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from river_compile.passes.program import Segment
from river_compile.passes.routing import chosen_experts


def bytes_of_token(segment: Segment, values: Sequence[object], first: int = 0) -> int:
    """Returns the bytes that one token reads of the values of a segment's placeholders.

    Args:
        segment: what reads them.
        values: tensors, and others that do not count, in the order of the placeholders.
        first: the placeholder of the first of them.
    """
    chosen = chosen_experts(segment)
    placeholders = segment.graph.find_nodes(op="placeholder")[first:]
    return sum(
        (value[: chosen[placeholder]] if placeholder in chosen else value).nbytes
        for placeholder, value in zip(placeholders, values, strict=False)
        if isinstance(value, Tensor)
    )
