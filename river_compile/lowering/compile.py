"""Turns segments into callables through Inductor, each distinct one once.

A compiled segment is called with a list of inputs and returns a sequence of outputs. Between Inductor's generated code
and its caller AOTAutograd puts wrappers (for aliases, duplicate arguments, autocast, profiling) that cost more than a
small kernel; where its own analysis says that none is needed, the generated code is called directly.

Not handled: graphs that need gradients (the backend gives those to Inductor whole).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
import torch._functorch.config
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from river_compile.kernels import portable
from river_compile.kernels.native.build import CannotBuild, working_compiler
from river_compile.lowering.choose import TRITON_LAYOUT, Lowering, warn_once
from river_compile.lowering.native import Callee, NativeSegment, native_graph, use_native
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import drop_unused
from river_compile.passes.nodes import called
from river_compile.passes.program import (
    Code,
    Example,
    Fingerprint,
    Program,
    Segment,
    SegmentSpec,
    Size,
    TensorSpec,
)
from river_compile.passes.segments import fingerprint

log = logging.getLogger("river_compile.lowering.compile")


@dataclass
class Compiled:
    """One distinct segment after compilation, which `uses` segments share.

    It is `direct` where the caller reaches Inductor's code without AOTAutograd's wrappers; `guards` are what Inductor
    assumed about the dynamic sizes in `mark`.
    """

    name: str
    callee: Callee
    direct: bool
    seconds: float
    mark: Fingerprint
    guards: tuple[sympy.Basic, ...]
    uses: int = 1


def lower(segment: Segment, lowering: Lowering) -> Code:
    """Returns a segment in the operators of a lowering.

    Where the river's operators are those of the C++ kernels, segments of nothing else skip Inductor. So does then any
    other prologue: its few operators take less time than compiling them, and one by one they give a token the same bits
    in passes of every width.
    """
    mark = segment.fingerprint or fingerprint(segment)
    module = native_graph(segment) if lowering.native else None
    runs_by: Literal["native", "operators", "inductor"] = "native"
    if module is None:
        by_operator = lowering.compiler == "eager" or (lowering.native and segment.kind == "prologue")
        module, runs_by = lower_ops(segment.graph, lowering.native), "operators" if by_operator else "inductor"
    for node in module.graph.nodes:
        node.meta = {}
    return Code(module, runs_by, mark)


@dataclass
class SegmentCompiler:
    """Makes callables of the segments of one program, of each distinct one once.

    `examples` are what the slots hold, fake tensors and numbers, on `device`. `native` says whether the river's
    operators are those of the C++ kernels; `config_patches` are for Inductor.
    """

    examples: Mapping[int, Any]
    device: torch.device
    native: bool
    config_patches: dict[str, object]
    compiled: list[Compiled] = field(default_factory=list)

    def compile(self, segment: SegmentSpec, operands: Sequence[Tensor]) -> Callee:
        """Returns a callable for the segment; `operands` are the real tensors that follow its inputs."""
        mark, code = segment.code.fingerprint, segment.code
        for known in self.compiled:
            if known.mark.digest == mark.digest and self._assumptions_hold(known, segment):
                known.uses += 1
                return known.callee
        start, direct = time.perf_counter(), True
        guards: tuple[sympy.Basic, ...] = ()
        callee: Callee
        if code.runs_by == "native":
            callee = NativeSegment(code.module)
        elif code.runs_by == "operators" or (self.native and _lacks_compiler()):
            callee = _by_operator(code.module, self.device)
        else:
            shape_env = self._shape_env(segment)
            before = len(shape_env.guards)
            inputs = [self.examples[slot] for slot in segment.inputs]
            callee, direct = _compile(code.module, inputs, operands, self.config_patches)
            guards = tuple(guard.expr for guard in shape_env.guards[before:])
        done = Compiled(segment.name, callee, direct, time.perf_counter() - start, mark, guards)
        log.info("compiled %s in %.1f s%s", segment.name, done.seconds, "" if direct else ", called through wrappers")
        self.compiled.append(done)
        return callee

    def _assumptions_hold(self, known: Compiled, segment: SegmentSpec) -> bool:
        """Asks for the guards of a compiled segment with another segment's dynamic sizes in place of its own.

        What holds becomes a guard of the whole graph, as it did when the first segment was compiled.
        """
        symbols = segment.code.fingerprint.symbols
        if not known.guards or known.mark.symbols == symbols:
            return True
        shape_env = self._shape_env(segment)
        by_name = {str(symbol): symbol for symbol in shape_env.var_to_range}
        swap = {by_name[a]: by_name[b] for a, b in zip(known.mark.symbols, symbols, strict=True)}
        return all(shape_env.evaluate_expr(guard.xreplace(swap)) for guard in known.guards)

    def _shape_env(self, segment: SegmentSpec) -> ShapeEnv:
        shape_env = _fake_mode([self.examples[slot] for slot in segment.inputs]).shape_env
        assert shape_env is not None, "Dynamo's fake tensors know their dynamic sizes"
        return shape_env


def _lacks_compiler() -> bool:
    """Whether there is none, which it says once: the kernels are the wheel's."""
    try:
        working_compiler()
    except CannotBuild as error:
        warn_once(f"what the compiled kernels do not compute of a model runs operator by operator: {error}")
        return True
    return False


def _fake_mode(examples: Sequence[Any]) -> FakeTensorMode:
    modes = (value.fake_mode for value in examples if isinstance(value, FakeTensor))
    mode = next(modes, None) or torch._guards.detect_fake_mode()
    assert isinstance(mode, FakeTensorMode), "Dynamo hands over graphs whose values are fake tensors"
    return mode


class StoredExamples(dict[int, Any]):
    """Fake tensors and numbers for what a program's slots hold, in a ShapeEnv of their own, each made when it is asked
    for."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program, self._shapes = program, ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._shapes)
        self._hints = {symbol: sympy.Integer(hint) for symbol, hint in program.hints}
        self._symbols = {
            symbol: self._shapes.create_symbol(hint, ConstantSource(f"stored_{symbol}"), DimDynamic.DYNAMIC, None)
            for symbol, hint in program.hints
        }

    def __missing__(self, slot: int) -> Any:
        self[slot] = made = self._made(self._program.examples[slot])
        return made

    def _made(self, example: Example) -> Any:
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


def inductor_settings(mode: str | None, whole: bool = True) -> dict[str, object]:
    """Returns Inductor's settings for a ``mode`` of torch.compile, for a whole graph or for segments of one.

    Segments get no CUDA graphs of Inductor's: their weights and caches are inputs like others, which these would copy
    or refuse; here they are captured together, or not at all.
    """
    settings = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    return settings if whole else settings | {"triton.cudagraphs": False}


def _by_operator(graph_module: fx.GraphModule, device: torch.device) -> Callee:
    """Returns a graph as it is, under the autocast in which it was traced (compiled code has its casts)."""
    if not torch.is_autocast_enabled(device.type):
        return lambda inputs: graph_module(*inputs)
    autocast = torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
    return autocast(lambda inputs: graph_module(*inputs))


def _compile(
    graph_module: fx.GraphModule, inputs: Sequence[Any], operands: Sequence[Tensor], config_patches: dict[str, object]
) -> tuple[Callee, bool]:
    fake_mode = _fake_mode(inputs)
    inputs = [*inputs, *(fake_mode.from_tensor(t, static_shapes=True) for t in operands)]
    direct: list[Callee] = []

    def inner_compile(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        code: Any = compile_fx_inner(graph, example_inputs, **kwargs)
        if _needs_no_wrapper(len(example_inputs), len(inputs)):
            direct.append(code.current_callable)
        return code

    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not fake_mode:  # (of a segment whose example values are its own)
        context = None
    settings: Any = torch.compiler.config
    # AOTAutograd's own cache would skip `inner_compile` on a hit; Inductor's cache, below it, stays in use.
    with (
        torch._guards.tracing(context),
        torch._functorch.config.patch(enable_autograd_cache=False),
        settings.patch(cache_key_tag=settings.cache_key_tag + _operators()),
    ):
        wrapped: Any = compile_fx(graph_module, inputs, inner_compile=inner_compile, config_patches=config_patches)
    if len(direct) == 1:
        return direct[0], True
    return lambda args: wrapped(*args), False


def _operators() -> str:
    """Returns a hash of the operators' schemas, which Inductor's cache does not look at."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(("river::", "river_native::"))]
    found = (getattr(getattr(torch.ops, space), name) for space, name in (name.split("::") for name in sorted(names)))
    return hashlib.sha256("".join(str(packet.default._schema) for packet in found).encode()).hexdigest()[:16]


def _needs_no_wrapper(num_inner_inputs: int, num_inputs: int) -> bool:
    """Tells from AOTAutograd's analysis whether the compiled graph maps inputs to outputs one to one.

    False where an output aliases an input or another output, where a mutation is left to the caller, where arguments
    were merged, or where effects or random state are threaded through.
    """
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return (
        metadata is not None
        and num_inner_inputs == num_inputs
        and not metadata.mutated_inp_runtime_indices
        and metadata.num_outputs_aliased == 0
        and metadata.num_intermediate_bases == 0
        and metadata.grad_enabled_mutation is None
        and not metadata.tokens
        and not metadata.is_rng_op_functionalized
    )


def lower_ops(traced: fx.Graph, native: bool = False) -> fx.GraphModule:
    """Returns a copy of a graph whose operators are those that run: with `native`, the C++ kernels take their places.

    They are opaque to Inductor, but for an exit score that no rule fused, which traces into ATen's operators.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    if native:
        use_native(graph)
    for node in graph.nodes:
        if node.target is torch.ops.river.linear.default:
            if node.args[6] == TRITON_LAYOUT and called(node.args[1], torch.cat):
                _take_apart(node)
        elif node.target is torch.ops.river.exit_score.default:
            node.target = portable.smallest_cosine
    return fx.GraphModule(traced.owning_module, graph, class_name="Segment")


def _take_apart(product: fx.Node) -> None:
    """Makes a matmul with concatenated matrices read them in place."""
    x, weight, _, bias, *_ = product.args
    product.target = torch.ops.river.merged.default
    product.args = (x, parts_of(weight), parts_of(bias))
    for joined in filter(None, (weight, bias)):
        drop_unused(joined)
