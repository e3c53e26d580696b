"""What all kernel specs share: identity, launches, costs, and the way from a spec to source text.

A spec is a frozen dataclass that holds every number a kernel is specialised for. `render` fills the family's template,
``templates/<family>.py.jinja``, with it: the template reads like the kernel, and what a spec does not need is not in
the text. A spec knows no tensors and no device; nothing here imports Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jinja2

#: torch dtype name -> Triton's name of it in a signature, its name in a kernel, and its bytes.
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "bool": "i1"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "bool": 1}
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")


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

    @property
    def parameters(self) -> str:
        """The function's parameters as source text."""
        return ", ".join(f"{a.name}_ptr" if a.pointer else a.name for a in self.arguments)


@dataclass(frozen=True)
class Workspace:
    """A buffer that the stages of one kernel share: name, dtype, and shape as a function of the number of rows."""

    name: str
    dtype: str
    shape: Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Cost:
    """Bytes that one call moves to and from memory, each buffer once, and its floating-point operations.

    A multiply-add counts two operations.
    """

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, flops_per_second: float) -> float:
        """The roofline: the longer of the two times, at bytes/s and operations/s."""
        return max(self.bytes / bandwidth, self.flops / flops_per_second)


@dataclass(frozen=True)
class KernelSpec:
    """Base of the specs. A family names its template and defines the methods below."""

    family: ClassVar[str]

    def stages(self) -> tuple[Stage, ...]:
        """The launches, in order."""
        raise NotImplementedError

    def workspaces(self) -> tuple[Workspace, ...]:
        """Buffers that the stages pass between them."""
        return ()

    def cost(self, rows: int | None = None) -> Cost:
        """Returns what a call costs; `rows` is needed where the spec leaves the number of rows open."""
        raise NotImplementedError


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # what comes out is a program and no page
    )
    environment.globals["masked"] = masked
    environment.filters["repr"] = repr
    return environment


def masked(*conditions: str | None, other: str | None = "0.0") -> str:
    """Returns the mask arguments of a load or (`other` None) of a store, for the conditions that are there.

    A condition that always holds is None. Without any there is no mask, since Triton does not find out by itself that
    one is always true.
    """
    used = [f"({condition})" for condition in conditions if condition]
    if not used:
        return ""
    text = used[0][1:-1] if len(used) == 1 else " & ".join(used)
    return f", mask={text}" + (f", other={other}" if other is not None else "")


def render(spec: KernelSpec) -> str:
    """Returns the Triton source of a spec: its fields as a header, then one function per stage.

    Equal specs give equal text.
    """
    template = _templates().get_template(f"{spec.family}.py.jinja")
    text = template.render(spec=spec, stages=spec.stages(), fields=dataclasses.asdict(spec))
    text = re.sub(r"\n\s*\n(?= )", "\n", text)  # a macro leaves an empty line where it was called,
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"  # and many where it was defined
