"""What a call of a compiled function does besides running its graph, and whether Dynamo would look at it as before.

Dynamo's code for a call reads the graph's inputs from where they are kept, runs the graph, writes back what the
function changed in Python, and builds what it returns. `CallEffects` says what is written back, so that whoever runs
the graph by itself can tell whether that is all that a call does. `Ambient` is what Dynamo's guards ask of the process
and the thread.

Not handled: what the guards ask of globals, closures and classes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo import eval_frame, symbolic_convert
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.utils import graph_break_reasons
from torch.nn.modules import module as nn_module


@dataclass(frozen=True)
class CallEffects:
    """What the function that a whole graph was traced from does in Python.

    Attributes:
        code: of the function.
        written: attributes that it writes of objects that do not come with its arguments: each object, held weakly,
            and a name.
    """

    code: CodeType
    written: tuple[tuple[weakref.ref, str], ...]

    def values(self) -> list[int]:
        """Returns what the written attributes hold now, by identity."""
        return [id(getattr(owner(), name, None)) for owner, name in self.written]


def effects_of_call(seen: tuple[type, ...]) -> CallEffects | None:
    """Returns the effects of the function that Dynamo is compiling, None where nobody could look for one of them.

    Args:
        seen: classes of objects that come with the arguments and that the caller looks at for itself.
    """
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    if tx is None:
        return None
    effects, reason = tx.output.side_effects, tx.output.compile_subgraph_reason
    if reason is None or reason.graph_break or tx.output.random_calls or effects.tensor_hooks:
        return None
    written: list[tuple[weakref.ref, str]] = []
    for variable in filter(effects.is_modified, list(effects.id_to_variable.values())):
        kind = type(variable.mutation_type).__name__
        if kind in ("AttributeMutationNew", "ValueMutationNew") or _is_own_keywords(variable, tx.f_code):
            continue  # (what is new is returned, or written to what is not)
        names = effects.store_attr_mutations.get(variable)
        if kind != "AttributeMutationExisting" or not names:
            return None  # (a list that grows, say, which has no value of its own while it holds tensors)
        owner = getattr(variable, "value", None)
        if not hasattr(owner, "__weakref__"):
            return None
        if not _comes_with_arguments(variable.source):
            written += [(weakref.ref(owner), name) for name in names]
        elif not isinstance(owner, seen):
            return None
    return CallEffects(tx.f_code, tuple(written))


def _is_own_keywords(variable: Any, code: CodeType) -> bool:
    """Whether a variable is the function's own ``**kwargs``, a dict that its caller does not see."""
    positional = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
    own = code.co_varnames[positional] if code.co_flags & 0x08 else None
    return type(variable.source).__name__ == "LocalSource" and variable.source.local_name == own


def _comes_with_arguments(source: Any) -> bool:
    while hasattr(source, "base"):
        source = source.base
    return type(source).__name__ == "LocalSource"


class Ambient:
    """What surrounds a call: modes, number of threads, autocast, and whether Dynamo would be asked at all."""

    def __init__(self) -> None:
        self._state = GlobalStateGuard()

    def unchanged(self) -> bool:
        """Returns whether a call from here would meet what it met when this was made."""
        return self._state.check() and is_plain()


def is_plain() -> bool:
    """Returns whether a call from here is an ordinary one: compiled code may run, and nobody traces or intercepts."""
    return (
        eval_frame._stance.stance == "default"
        and eval_frame._stance.backend is None
        and get_eval_frame_callback() is None
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not nn_module._global_forward_hooks
        and not nn_module._global_forward_pre_hooks
    )


def break_before(model: nn.Module) -> GraphCompileReason | None:
    """Returns why Dynamo last broke a graph, where what it compiles is a piece of a model's code; None elsewhere."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    piece = tx is not None and tx.f_code not in code_that_runs(model)
    return graph_break_reasons[-1] if piece and graph_break_reasons else None


def code_that_runs(model: nn.Module) -> Iterator[CodeType]:
    """Yields the code of the functions that a call of a model without hooks runs: its own call and its forward."""
    for function in (model._call_impl, model.forward):
        code = getattr(function, "__code__", None)
        if code is not None:
            yield code
