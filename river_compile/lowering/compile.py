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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch._functorch.config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from river_compile.kernels import portable
from river_compile.kernels.native.build import CannotBuild, working_compiler
from river_compile.lowering.choose import TRITON_LAYOUT, Lowering, warn_once
from river_compile.lowering.native import native_segment, use_native
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import drop_unused
from river_compile.passes.nodes import called, value_of
from river_compile.passes.program import Fingerprint, Segment
from river_compile.passes.segments import fingerprint
from river_compile.runtime.runner import Callee

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


@dataclass
class SegmentCompiler:
    """Compiles the segments of one traced graph, each distinct one once.

    `config_patches` are for Inductor. Where the river's operators are those of the C++ kernels, segments of nothing
    else skip Inductor. So does then any other prologue: its few operators take less time than compiling them, and one
    by one they give a token the same bits in passes of every width.
    """

    lowering: Lowering
    config_patches: dict[str, object]
    compiled: list[Compiled] = field(default_factory=list)

    def compile(self, segment: Segment, packed: Sequence[Tensor]) -> Callee:
        """Returns a callable for the segment; `packed` are the real tensors of its 4-bit weights."""
        mark = segment.fingerprint or fingerprint(segment)
        shape_env = _fake_mode(segment).shape_env
        assert shape_env is not None, "Dynamo's fake tensors know their dynamic sizes"
        for known in self.compiled:
            if known.mark.digest == mark.digest and _assumptions_hold(known, mark.symbols, shape_env):
                known.uses += 1
                return known.callee
        start = time.perf_counter()
        guards_before = len(shape_env.guards)
        native = self.lowering.native
        callee: Callee | None = native_segment(segment) if native else None
        direct = True
        if callee is None and self._runs_by_operator(segment):
            callee = _by_operator(segment, self.lowering)
        elif callee is None:
            callee, direct = _compile(segment, packed, self.config_patches, self.lowering)
        guards = tuple(guard.expr for guard in shape_env.guards[guards_before:])
        done = Compiled(segment.name, callee, direct, time.perf_counter() - start, mark, guards)
        log.info("compiled %s in %.1f s%s", segment.name, done.seconds, "" if direct else ", called through wrappers")
        self.compiled.append(done)
        return callee

    def _runs_by_operator(self, segment: Segment) -> bool:
        by_choice = self.lowering.compiler == "eager" or (self.lowering.native and segment.name == "prologue")
        return by_choice or (self.lowering.native and _lacks_compiler())


def _lacks_compiler() -> bool:
    """Whether there is none, which it says once: the kernels are the wheel's."""
    try:
        working_compiler()
    except CannotBuild as error:
        warn_once(f"what the compiled kernels do not compute of a model runs operator by operator: {error}")
        return True
    return False


def _examples(segment: Segment) -> list[Any]:
    """Returns example values of a segment's inputs; the placeholders of packed weights, which come last, have none."""
    return [value_of(node) for node in segment.graph.find_nodes(op="placeholder")][: len(segment.inputs)]


def _fake_mode(segment: Segment) -> FakeTensorMode:
    modes = (value.fake_mode for value in _examples(segment) if isinstance(value, FakeTensor))
    mode = next(modes, None) or torch._guards.detect_fake_mode()
    assert isinstance(mode, FakeTensorMode), "Dynamo hands over graphs whose values are fake tensors"
    return mode


def _assumptions_hold(known: Compiled, symbols: tuple[str, ...], shape_env: ShapeEnv) -> bool:
    """Asks for the guards of a compiled segment with another segment's dynamic sizes in place of its own.

    What holds becomes a guard of the whole graph, as it did when the first segment was compiled.
    """
    if known.mark.symbols == symbols:
        return True
    by_name = {str(symbol): symbol for symbol in shape_env.var_to_range}
    swap = {by_name[a]: by_name[b] for a, b in zip(known.mark.symbols, symbols, strict=True)}
    return all(shape_env.evaluate_expr(guard.xreplace(swap)) for guard in known.guards)


def inductor_settings(mode: str | None, whole: bool = True) -> dict[str, object]:
    """Returns Inductor's settings for a ``mode`` of torch.compile, for a whole graph or for segments of one.

    Segments get no CUDA graphs of Inductor's: their weights and caches are inputs like others, which these would copy
    or refuse; here they are captured together, or not at all.
    """
    settings = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    return settings if whole else settings | {"triton.cudagraphs": False}


def _by_operator(segment: Segment, lowering: Lowering) -> Callee:
    """Returns a segment's graph as it is, under the autocast in which it was traced (compiled code has its casts)."""
    graph_module = lower_ops(segment.graph, lowering.native)
    device = next((v.device.type for v in _examples(segment) if isinstance(v, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return lambda inputs: graph_module(*inputs)
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
    return autocast(lambda inputs: graph_module(*inputs))


def _compile(
    segment: Segment, packed: Sequence[Tensor], config_patches: dict[str, object], lowering: Lowering
) -> tuple[Callee, bool]:
    graph_module = lower_ops(segment.graph, lowering.native)
    fake_mode, inputs = _fake_mode(segment), _examples(segment)
    inputs += [fake_mode.from_tensor(t, static_shapes=True) for t in packed]
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
