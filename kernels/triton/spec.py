"""What all kernel specs share: identity, header, launch stages, costs.

A spec is a frozen dataclass that holds every number a kernel is specialised for. `render` turns it into Triton source;
equal specs give equal text and equal hashes. A spec knows no tensors and no device; nothing here imports Triton.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import sympy

from .expressions import symbol

#: torch dtype name -> Triton's name of it in a signature, and its bytes.
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "i1"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "bool": 1}
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")

#: Rows of the activations in a cost formula; a number in a spec for at most 16 rows, given at launch otherwise.
M = symbol("M")


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel function: a pointer to elements of `dtype`, or an int32 scalar."""

    name: str
    dtype: str
    pointer: bool = True

    @property
    def signature(self) -> str:
        return ("*" if self.pointer else "") + DTYPES[self.dtype]


@dataclass(frozen=True)
class Stage:
    """One launch of a kernel: the function, its parameters in order, its grid and options.

    `grid` maps the number of rows (ignored by kernels of fixed rows) to the three grid dimensions.
    """

    function: str
    arguments: tuple[Argument, ...]
    grid: Callable[[int], tuple[int, int, int]]
    num_warps: int = 4
    num_stages: int = 2

    def define(self, lines: Lines) -> None:
        """Writes the decorator and the def line."""
        lines.add("", "", "@triton.jit")
        names = [f"{argument.name}_ptr" if argument.pointer else argument.name for argument in self.arguments]
        lines.add(f"def {self.function}({', '.join(names)}):")


@dataclass(frozen=True)
class Workspace:
    """A buffer that the stages of one kernel share: name, dtype, and shape as a function of the number of rows."""

    name: str
    dtype: str
    shape: Callable[[int], tuple[int, ...]]


class Lines:
    """Source text under construction, with the current indentation."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def add(self, *lines: str) -> None:
        self._lines += ["    " * self._depth + line if line else "" for line in lines]

    @contextmanager
    def indented(self, opening: str = "") -> Iterator[None]:
        """Indents what follows below the line `opening`; an empty one opens nothing (as in a function body)."""
        if opening:
            self.add(opening)
        self._depth += 1
        yield
        self._depth -= 1

    @contextmanager
    def loop(self, variable: str, steps: int) -> Iterator[None]:
        """Opens `for variable in range(steps)`, or nothing where there is a single step."""
        if steps == 1:
            yield
        else:
            with self.indented(f"for {variable} in range({steps}):"):
                yield

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


@dataclass(frozen=True)
class KernelSpec:
    """Base of the specs. A family defines the five methods below; everything else follows from them."""

    family: ClassVar[str]

    def stages(self) -> tuple[Stage, ...]:
        """The launches, in order."""
        raise NotImplementedError

    def workspaces(self) -> tuple[Workspace, ...]:
        """Buffers that the stages pass between them."""
        return ()

    def bytes(self) -> sympy.Expr:
        """Bytes that the kernel moves to and from memory, each buffer once, as a formula of the family's symbols."""
        raise NotImplementedError

    def flops(self) -> sympy.Expr:
        """Floating-point operations, a multiply-add counting two, as a formula of the family's symbols."""
        raise NotImplementedError

    def values(self) -> Mapping[sympy.Symbol, int]:
        """The numbers that this spec gives to the symbols of its formulas."""
        raise NotImplementedError

    def write(self, lines: Lines) -> None:
        """Writes the kernel functions."""
        raise NotImplementedError

    def cost(self, rows: int | None = None) -> Cost:
        """Evaluates the formulas; `rows` is needed where the spec leaves the number of rows open."""
        values = {M: rows, **self.values()} if rows is not None else self.values()
        moved, operations = self.bytes().subs(values), self.flops().subs(values)
        if moved.free_symbols | operations.free_symbols:
            raise ValueError(f"this {self.family} kernel takes any number of rows; say for how many the cost is asked")
        return Cost(int(moved), int(operations))

    def fields(self) -> dict[str, object]:
        """The spec as nested plain values, in the order of its fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations of one call."""

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, flops_per_second: float) -> float:
        """The roofline: the longer of the two times, at bytes/s and operations/s."""
        return max(self.bytes / bandwidth, self.flops / flops_per_second)


def render(spec: KernelSpec) -> str:
    """Returns the Triton source of a spec: its fields as a header, then one function per stage.

    Equal specs give equal text.
    """
    lines = Lines()
    lines.add(f'"""Generated by River Compile for one {spec.family} spec; changes here are overwritten.', "")
    for name, value in spec.fields().items():
        lines.add(f"    {name} = {value!r}")
    lines.add('"""', "", "import triton", "import triton.language as tl")
    spec.write(lines)
    return lines.text()


def source_hash(source: str) -> str:
    """Returns the 16 hexadecimal digits that name a source file."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
