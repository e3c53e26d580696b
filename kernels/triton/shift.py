"""A full sliding window makes room for a token: all entries of keys and values move up by one slot, in place, in one
launch.

A program owns some features of one head of one sequence, of the keys or of the values, and walks through its slots
upwards in blocks: it loads a block's successors, waits for all of its threads to have done so, and stores them. What is
loaded later lies above all that was stored, and no two programs touch the same element, so their order does not matter.
The last slot keeps what it holds, which whoever fills it overwrites; its index is written to `slot`.

Not handled: more than one token.

Legend: B sequences, J key-value heads, D features of a head, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from river_compile.kernels.checks import check_positive
from river_compile.kernels.triton.spec import DTYPES, Buffer, CacheSpec, Cost, Stage, is_power_of_two, next_power_of_two

_SLICE = 32  # bytes of each slot that a program owns: what memory moves at once, so that many programs share a head


@dataclass(frozen=True)
class ShiftSpec(CacheSpec):
    """One shape of a window; `heads` counts for nothing."""

    family: ClassVar[str] = "shift"

    block: int = 1024  # slots at a time, at most
    num_warps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(num_warps=self.num_warps)
        if not is_power_of_two(self.block):
            raise ValueError(f"block={self.block} is not a power of two")

    @property
    def features(self) -> int:
        """How many features a program owns."""
        return _SLICE // DTYPES[self.dtype][1]

    @property
    def slots_at_once(self) -> int:
        """How many slots a program moves between two barriers."""
        return min(self.block, next_power_of_two(max(self.slots - 1, 1)))

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        return {"k_cache": self.cache, "v_cache": self.cache, "slot": Buffer("int64", (1,))}

    def stages(self) -> tuple[Stage, ...]:
        grid = (-(-self.head_dim // self.features), 2 * self.kv_heads, self.batch)
        return (Stage(self.family, tuple(self.buffers()), lambda _rows: grid, self.num_warps),)

    def flops(self, rows: int | None = None) -> int:
        return 0

    def cost(self, rows: int | None = None) -> Cost:
        """Returns what a call costs: all but one slot of either cache are read, and as many written."""
        return Cost(4 * self.cache.bytes // self.slots * (self.slots - 1) + 8, 0)
