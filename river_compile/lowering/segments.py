"""Turns the segments of a program into callables, each distinct one once.

Not handled: graphs that need gradients, which the backend gives to Inductor whole.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from river_compile.kernels.native.build import CannotBuild, working_compiler
from river_compile.lowering.lower import warn_once
from river_compile.lowering.native import Callee, NativeSegment, foreign_operators
from river_compile.passes.program import Example, Fingerprint, Program, SegmentSpec, Size, TensorSpec

log = logging.getLogger("river_compile.lowering")


@dataclass
class Compiled:
    """One distinct compiled segment."""

    name: str
    callee: Callee
    direct: bool  # Inductor's code is called without AOTAutograd's wrappers
    seconds: float
    fingerprint: Fingerprint
    guards: tuple[sympy.Basic, ...]  # that Inductor assumed for the dynamic sizes in `fingerprint`
    uses: int = 1  # segments that share it


@dataclass
class SegmentCompiler:
    """Compiles the segments of one program, each distinct one once."""

    examples: Mapping[int, Any]  # fake tensors and numbers, by slot
    device: torch.device
    native: bool  # C++ kernels
    mode: str | None  # of torch.compile, for Inductor
    compiled: list[Compiled] = field(default_factory=list)

    def compile(self, segment: SegmentSpec, operands: Sequence[Tensor]) -> Callee:
        """Return a callable for a segment; `operands` are the real tensors that follow its inputs."""
        code = segment.code
        for known in self.compiled:
            if known.fingerprint.digest == code.fingerprint.digest and self._guards_hold(known, segment):
                known.uses += 1
                return known.callee
        start, direct = time.perf_counter(), True
        guards: tuple[sympy.Basic, ...] = ()
        callee: Callee
        if code.runs_by == "native":
            callee = NativeSegment(code.module)
        elif code.runs_by == "operators" or (self.native and _lacks_compiler()):
            callee = _run_operators(code.module, self.device)
        else:
            from river_compile.lowering.inductor import compile_segment

            shape_env = self._shape_env(segment)
            before = len(shape_env.guards)
            inputs = [self.examples[slot] for slot in segment.inputs]
            callee, direct = compile_segment(code.module, inputs, operands, _fake_mode(inputs), self.mode)
            guards = tuple(guard.expr for guard in shape_env.guards[before:])
        done = Compiled(segment.name, callee, direct, time.perf_counter() - start, code.fingerprint, guards)
        log.info("compiled %s in %.1f s%s", segment.name, done.seconds, "" if direct else ", called through wrappers")
        self.compiled.append(done)
        return callee

    def describe(self, segment: SegmentSpec) -> str:
        """Return a segment's name; if Inductor compiles it, which takes seconds, say so and why."""
        if segment.code.runs_by != "inductor":
            return segment.name
        names = foreign_operators(segment.code.module.graph) if self.native else ()
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{segment.name} by Inductor" + (f", since {names[0]}{more} have no C++ kernel" if names else "")

    def _guards_hold(self, known: Compiled, segment: SegmentSpec) -> bool:
        """Evaluate the guards for another segment's sizes; true ones become guards of the whole graph."""
        symbols = segment.code.fingerprint.symbols
        if not known.guards or known.fingerprint.symbols == symbols:
            return True
        shape_env = self._shape_env(segment)
        by_name = {str(symbol): symbol for symbol in shape_env.var_to_range}
        swap = {by_name[a]: by_name[b] for a, b in zip(known.fingerprint.symbols, symbols, strict=True)}
        return all(shape_env.evaluate_expr(guard.xreplace(swap)) for guard in known.guards)

    def _shape_env(self, segment: SegmentSpec) -> ShapeEnv:
        shape_env = _fake_mode([self.examples[slot] for slot in segment.inputs]).shape_env
        assert shape_env is not None, "Dynamo's fake tensors know their dynamic sizes"
        return shape_env


def _lacks_compiler() -> bool:
    """True, with one warning, if there is no C++ compiler; the kernels are the wheel's."""
    try:
        working_compiler()
    except CannotBuild as error:
        warn_once("RC101", f"Operators outside of the C++ kernels run one by one, so they are slower. {error}")
        return True
    return False


def _fake_mode(examples: Sequence[Any]) -> FakeTensorMode:
    modes = (value.fake_mode for value in examples if isinstance(value, FakeTensor))
    mode = next(modes, None) or torch._guards.detect_fake_mode()
    assert isinstance(mode, FakeTensorMode), "Dynamo hands over graphs whose values are fake tensors"
    return mode


class ProgramExamples(dict[int, Any]):
    """Fake tensors and numbers for a program's slots, made on first use in a separate ShapeEnv."""

    # Segments of C++ operators need none of it, and torch's first symbol imports torch.export.
    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program
        self._hints = {symbol: sympy.Integer(hint) for symbol, hint in program.hints}

    @functools.cached_property
    def _shapes(self) -> ShapeEnv:
        return ShapeEnv()

    @functools.cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode(shape_env=self._shapes)

    @functools.cached_property
    def _symbols(self) -> dict[sympy.Symbol, sympy.Expr]:
        return {
            symbol: self._shapes.create_symbol(hint, ConstantSource(f"stored_{symbol}"), DimDynamic.DYNAMIC, None)
            for symbol, hint in self._program.hints
        }

    def __missing__(self, slot: int) -> Any:
        self[slot] = made = self._make(self._program.examples[slot])
        return made

    def _make(self, example: Example) -> Any:
        if not isinstance(example, TensorSpec):
            return None if example is None else self._number(example)
        shape, stride = (tuple(map(self._number, sizes)) for sizes in (example.shape, example.stride))
        meta = torch.empty_strided(shape, stride, dtype=example.dtype, device="meta")
        meta.requires_grad_(example.requires_grad)
        return FakeTensor(self._mode, meta, example.device)

    def _number(self, size: Size) -> int | torch.SymInt:
        if isinstance(size, int):
            return size
        hint = int(size.xreplace(self._hints))
        return self._shapes.create_symintnode(size.xreplace(self._symbols), hint=hint)


def _run_operators(graph_module: fx.GraphModule, device: torch.device) -> Callee:
    """Return a callable that runs a graph under the autocast of its trace; compiled code contains the casts."""
    if not torch.is_autocast_enabled(device.type):
        return lambda inputs: graph_module(*inputs)
    autocast = torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
    return autocast(lambda inputs: graph_module(*inputs))
