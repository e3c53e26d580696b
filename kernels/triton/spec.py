"""The base of all kernel specs: buffers, launches, costs, and the rendering of a spec to source text.

A spec is a frozen dataclass of every number that a kernel is specialised for. `render` fills the family's template,
``templates/<family>.py.jinja``, with it. A spec knows no tensors and no device; nothing here imports torch or Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2

from river_compile.kernels.checks import check_choice, check_positive

# torch dtype name -> its name in a signature of Triton, and its bytes.
DTYPES = {
    "float32": ("fp32", 4),
    "float16": ("fp16", 2),
    "bfloat16": ("bf16", 2),
    "int32": ("i32", 4),
    "int64": ("i64", 8),
    "bool": ("i1", 1),
}
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_DEVICE = "sm_90"  # whose tiles unknown devices get


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class Buffer:
    """One tensor of a call, contiguous unless it is strided."""

    dtype: str  # its torch name
    shape: tuple[int, ...]
    strided: bool = False  # then shape and strides are for the caller to check
    workspace: bool = False  # passed between programs or stages of the kernel, allocated at the launch
    kept_for: str = ""  # names a buffer: a workspace of zeros for each memory of it, zero again after each launch

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Stage:
    """One launch of a kernel."""

    function: str
    arguments: tuple[str, ...]  # names of buffers, whose pointers the function takes, and "rows", an int32
    grid: Callable[[int], tuple[int, int, int]]  # of the number of rows, which kernels of fixed rows ignore
    num_warps: int = 4
    num_stages: int = 2

    @property
    def parameters(self) -> str:
        """The function's parameters as source text."""
        return ", ".join(name if name == "rows" else f"{name}_ptr" for name in self.arguments)


@dataclass(frozen=True)
class Cost:
    """Bytes that a call moves to and from memory, each buffer once, and its operations (a multiply-add is two)."""

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, flops_per_second: float) -> float:
        """Return the roofline: the longer of the two times, at bytes/s and operations/s."""
        return max(self.bytes / bandwidth, self.flops / flops_per_second)


@dataclass(frozen=True)
class KernelSpec:
    """Base of the specs. A family defines its template, `buffers`, `stages` and `flops`."""

    family: ClassVar[str]

    # `rows` is required if the spec leaves the number of rows open, else ignored.
    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        """Return every buffer of a call, in the order of the parameters."""
        raise NotImplementedError

    def stages(self) -> tuple[Stage, ...]:
        raise NotImplementedError

    def flops(self, rows: int | None = None) -> int:
        raise NotImplementedError

    def cost(self, rows: int | None = None) -> Cost:
        """Return the cost of a call; a workspace is written and read, kept counters do not count."""
        buffers = [buffer for buffer in self.buffers(rows).values() if not buffer.kept_for]
        moved = sum((2 if buffer.workspace else 1) * buffer.bytes for buffer in buffers)
        return Cost(moved, self.flops(rows))


@dataclass(frozen=True)
class CacheSpec(KernelSpec):
    """Base of the kernels on a static cache ``[B, J, S, D]``, for one position of each sequence or several."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: str = field(default="bfloat16", kw_only=True)  # of queries, keys, values and heads' norms
    # Elements from one sequence, head and slot to the next; empty for a contiguous cache.
    cache_strides: tuple[int, ...] = field(default=(), kw_only=True)
    positions: int | None = field(default=1, kw_only=True)  # T: one, or None for any number, given at launch as rows

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        check_positive(slots=self.slots)
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES)
        if len(self.cache_strides) not in (0, 3):
            raise ValueError(f"cache_strides={self.cache_strides} are not those of sequence, head and slot")
        check_choice("positions", self.positions, (1, None))

    @property
    def strides(self) -> tuple[int, ...]:
        line = self.slots * self.head_dim
        return self.cache_strides or (self.kv_heads * line, line, self.head_dim)

    def lines(self, rows: int | None) -> int:
        """Return the positions of all sequences."""
        return self.batch * self.at_once(rows)

    def at_once(self, rows: int | None) -> int:
        """Return the positions of a sequence: one, or `rows` (else ValueError) if the spec leaves them open."""
        if self.positions is None and rows is None:
            raise ValueError(f"this {self.family} kernel takes any number of positions; pass the number as rows")
        return self.positions or rows or 1

    @property
    def scalars(self) -> tuple[str, ...]:
        """Arguments of a launch other than buffers."""
        return () if self.positions else ("rows",)

    @property
    def cache(self) -> Buffer:
        """The keys, and the values."""
        return Buffer(self.dtype, (self.batch, self.kv_heads, self.slots, self.head_dim), strided=True)


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is a program, not a page
    )
    environment.globals |= {"masked": masked, "next_power_of_two": next_power_of_two}
    environment.filters["repr"] = repr
    return environment


def masked(*conditions: str | None, other: str | None = "0.0") -> str:
    """Return the mask arguments of a load or (`other` None) a store; conditions that always hold are None."""
    # Without conditions there is no mask: Triton does not detect that one is always true.
    used = [f"({condition})" for condition in conditions if condition]
    if not used:
        return ""
    text = used[0][1:-1] if len(used) == 1 else " & ".join(used)
    return f", mask={text}" + (f", other={other}" if other is not None else "")


def render(spec: KernelSpec) -> str:
    """Return the Triton source of a spec: its fields as a header, then a function per stage. Equal for equal specs."""
    template = _templates().get_template(f"{spec.family}.py.jinja")
    text = template.render(spec=spec, stages=spec.stages(), fields=dataclasses.asdict(spec))
    text = re.sub(r"\n\s*\n(?= )", "\n", text)  # a call of a macro leaves an empty line,
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"  # and its definition many
