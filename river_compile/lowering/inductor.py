"""Compiles graphs with Inductor. Its compiler takes a second to import, so this module is imported on first use.

Not handled: segments whose operators are all C++ (`native.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensorMode

from river_compile.lowering.native import Callee


def compile_whole(graph_module: fx.GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    """Compile a graph that Dynamo traced, with the settings of a ``mode`` of torch.compile."""
    compiled: Any = compile_fx(graph_module, inputs, config_patches=_settings(mode))
    return compiled


def _settings(mode: str | None) -> dict[str, object]:
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def compile_segment(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    operands: Sequence[Tensor],
    fake_mode: FakeTensorMode,
    mode: str | None,
) -> tuple[Callee, bool]:
    """Compile a segment for fake inputs and the real operands after them.

    Returns:
        A callable, and whether it is Inductor's code itself.
    """
    # Inductor's CUDA graphs would copy weights and caches, which are inputs of segments; River makes its own captures.
    settings = _settings(mode) | {"triton.cudagraphs": False}
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
    compiler: Any = torch.compiler.config
    # AOTAutograd's own cache would skip `inner_compile` on a hit; Inductor's cache, below it, stays in use.
    with (
        torch._guards.tracing(context),
        torch._functorch.config.patch(enable_autograd_cache=False),
        compiler.patch(cache_key_tag=compiler.cache_key_tag + _hash_schemas()),
    ):
        wrapped: Any = compile_fx(graph_module, inputs, inner_compile=inner_compile, config_patches=settings)
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
