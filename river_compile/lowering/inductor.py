"""Chooses the kernels of a graph and compiles its segments with Inductor, each distinct one once.

Not handled: graphs that need gradients, which the backend gives to Inductor whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import time
import warnings
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

from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.kernels import portable
from river_compile.kernels.messages import with_id
from river_compile.kernels.native import load as native_kernels
from river_compile.kernels.native.build import CannotBuild, has_prebuilt, working_compiler
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT, PLAIN_LAYOUT, TRITON_LAYOUT
from river_compile.lowering.native import Callee, NativeSegment, foreign_operators, native_graph, use_native
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import drop_unused
from river_compile.passes.nodes import called
from river_compile.passes.program import (
    Code,
    Example,
    Fingerprint,
    Lowering,
    Program,
    Refusal,
    Segment,
    SegmentSpec,
    Size,
    TensorSpec,
)
from river_compile.passes.segments import fingerprint

log = logging.getLogger("river_compile.lowering.inductor")


def choose_lowering(config: RiverConfig, device: torch.device, flex: bool = False) -> Lowering:
    """Return the lowering of a graph (`flex`: it calls flex attention); raise a CannotBuild or an OptionError."""
    if isinstance(config.kernels, Lowering):
        return config.kernels
    if flex and device.type == "cpu":
        warn_once(
            "RC083",
            "attn_implementation='flex_attention' is not fully supported by Inductor on a CPU, so this model runs "
            "operator by operator. Load it with attn_implementation='sdpa', which River's C++ kernels support",
        )
        return Lowering("eager", PLAIN_LAYOUT, fuse=False)
    on_gpu = device.type == "cuda"
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"River has no 4-bit kernels for a model on {device}. Move it to a CPU or a GPU", id="RC004")
    if config.kernels == "native" and on_gpu:
        raise OptionError("kernels='native' has no kernel for a model on a GPU. Use kernels='auto'", id="RC004")
    if config.kernels == "native" or (config.kernels == "auto" and not on_gpu):
        native_kernels.load()
        return Lowering("inductor", NATIVE_LAYOUT, fuse=True)
    if importlib.util.find_spec("triton") is None:
        raise OptionError(
            f"kernels={config.kernels!r} requires Triton here, which is not installed. Run pip install triton, or move "
            "the model to a CPU and use kernels='auto'",
            id="RC005",
        )
    return Lowering("inductor", TRITON_LAYOUT, fuse=True)


def load_generated() -> None:
    """Have generated kernels run the operators that they compute."""
    from river_compile.kernels.triton import operators  # noqa: F401  (registers them)


def begin_kernels(config: RiverConfig, device: torch.device) -> None:
    """Start to compile missing C++ kernels in the background, while a model is traced."""
    if device.type == "cpu" and config.kernels in ("auto", "native"):
        with contextlib.suppress(CannotBuild):  # `choose_lowering` raises it
            native_kernels.begin()


def no_compiler(config: RiverConfig, example_inputs: Sequence[Any], rewritten: bool) -> Refusal | None:
    """Return why a graph cannot be compiled for a CPU, None if it can or need not."""
    if config.runs_by_operator or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in example_inputs):
        return None
    # With the wheel's C++ kernels an optimized graph needs no compiler: other operators run one by one.
    if rewritten and has_prebuilt() and config.kernels in ("auto", "native"):
        return None
    try:
        working_compiler()
    except CannotBuild as error:
        return Refusal(str(error))
    return None


def warn_of_slow_lowering(lowering: Lowering, device: torch.device) -> None:
    if lowering.layout == TRITON_LAYOUT and device.type == "cpu":
        warn_once(
            "RC083",
            "kernels='triton' on a CPU runs the generated kernels in Triton's interpreter. Results are a GPU's up to "
            "rounding and take thousands of times longer. Use kernels='auto' except for tests",
        )


@functools.cache
def warn_once(id: str, text: str) -> None:
    warnings.warn(with_id(id, text), RiverWarning, stacklevel=4)


def inductor_settings(mode: str | None, whole: bool = True) -> dict[str, object]:
    """Return Inductor's settings for a ``mode`` of torch.compile, for a whole graph or for segments of one."""
    settings = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    # Inductor's CUDA graphs would copy weights and caches, which are inputs of segments; River makes its own captures.
    return settings if whole else settings | {"triton.cudagraphs": False}


def lower_segment(segment: Segment, lowering: Lowering) -> Code:
    """Return a segment in the operators of a lowering; one that is only C++ operators skips Inductor."""
    mark = segment.fingerprint or fingerprint(segment)
    module = native_graph(segment) if lowering.native else None
    runs_by: Literal["native", "operators", "inductor"] = "native"
    if module is None:
        # An embedding stage has too few operators to be worth compiling, and operator by operator a token gets the
        # same bits in passes of every width.
        by_operator = lowering.compiler == "eager" or (lowering.native and segment.kind == "prologue")
        module, runs_by = lower_ops(segment.graph, lowering.native), "operators" if by_operator else "inductor"
    for node in module.graph.nodes:
        node.meta = {}
    return Code(module, runs_by, mark)


def lower_ops(traced: fx.Graph, native: bool = False) -> fx.GraphModule:
    """Return a copy of a graph that can run, with `native` by the C++ kernels."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    if native:
        use_native(graph)
    for node in graph.nodes:
        if node.target is torch.ops.river.linear.default:
            if node.args[6] == TRITON_LAYOUT and called(node.args[1], torch.cat):
                _split_weights(node)
        elif node.target is torch.ops.river.exit_score.default:  # an operator that no rule fused
            node.target = portable.smallest_cosine
    return fx.GraphModule(traced.owning_module, graph, class_name="Segment")


def _split_weights(linear: fx.Node) -> None:
    """Make a linear read its concatenated weights in place."""
    x, weight, _, bias, *_ = linear.args
    linear.target = torch.ops.river.merged.default
    linear.args = (x, parts_of(weight), parts_of(bias))
    for joined in filter(None, (weight, bias)):
        drop_unused(joined)


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
    config_patches: dict[str, object]  # for Inductor
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
            shape_env = self._shape_env(segment)
            before = len(shape_env.guards)
            inputs = [self.examples[slot] for slot in segment.inputs]
            callee, direct = _compile(code.module, inputs, operands, self.config_patches)
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


def _compile(
    graph_module: fx.GraphModule, inputs: Sequence[Any], operands: Sequence[Tensor], config_patches: dict[str, object]
) -> tuple[Callee, bool]:
    """Compile a graph; return a callable and whether it is Inductor's code itself."""
    fake_mode = _fake_mode(inputs)
    inputs = [*inputs, *(fake_mode.from_tensor(t, static_shapes=True) for t in operands)]
    direct: list[Callee] = []

    def inner_compile(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        code: Any = compile_fx_inner(graph, example_inputs, **kwargs)
        # AOTAutograd's wrappers (for aliases, autocast, profiling) cost more than a small kernel.
        if _needs_no_wrapper(len(example_inputs), len(inputs)):
            direct.append(code.current_callable)
        return code

    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not fake_mode:  # of a segment with `ProgramExamples`
        context = None
    settings: Any = torch.compiler.config
    # AOTAutograd's own cache would skip `inner_compile` on a hit; Inductor's cache, below it, stays in use.
    with (
        torch._guards.tracing(context),
        torch._functorch.config.patch(enable_autograd_cache=False),
        settings.patch(cache_key_tag=settings.cache_key_tag + _hash_schemas()),
    ):
        wrapped: Any = compile_fx(graph_module, inputs, inner_compile=inner_compile, config_patches=config_patches)
    if len(direct) == 1:
        return direct[0], True
    return lambda args: wrapped(*args), False


def _hash_schemas() -> str:
    """Return a hash of the operators' schemas, which Inductor's cache key lacks."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(("river::", "river_native::"))]
    found = (getattr(getattr(torch.ops, space), name) for space, name in (name.split("::") for name in sorted(names)))
    return hashlib.sha256("".join(str(packet.default._schema) for packet in found).encode()).hexdigest()[:16]


def _needs_no_wrapper(num_inner_inputs: int, num_inputs: int) -> bool:
    """True if AOTAutograd found no aliases, merged arguments, mutations, effects or random state."""
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
