"""What a call of a compiled function does besides running its graph.

Dynamo's code for a call reads the graph's inputs from where they are kept, runs the graph, writes back what the
function changed in Python, and builds what it returns. Whoever runs the graph by itself asks here whether that is all.

Not handled: code that Dynamo does not see, such as hooks that it skips.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch import nn
from torch._dynamo import symbolic_convert
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.utils import graph_break_reasons


def code_without_effects(seen: tuple[type, ...]) -> CodeType | None:
    """Returns the code of the function that Dynamo is compiling; None where it does more than to run one graph.

    Args:
        seen: classes of objects among the arguments whose attributes it may write: the caller looks after them.
    """
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    if tx is None:
        return None
    effects, reason = tx.output.side_effects, tx.output.compile_subgraph_reason
    if reason is None or reason.graph_break or tx.output.random_calls or effects.tensor_hooks:
        return None
    for variable in filter(effects.is_modified, list(effects.id_to_variable.values())):
        kind = type(variable.mutation_type).__name__
        if kind in ("AttributeMutationNew", "ValueMutationNew") or _is_own_keywords(variable, tx.f_code):
            continue  # (what is new is returned, or written to what is not)
        names = effects.store_attr_mutations.get(variable)
        if kind != "AttributeMutationExisting" or not names:
            return None  # (a list that grows, say)
        owner = getattr(variable, "value", None)
        if not ((_comes_with_arguments(variable.source) and isinstance(owner, seen)) or _is_there(owner, names)):
            return None
    code: CodeType = tx.f_code
    return code


def _is_there(owner: object, written: Mapping[str, Any]) -> bool:
    """Whether an object's attributes are the constants that are written to them already, as a flag that is reset is."""
    for name, value in written.items():
        new = getattr(value, "value", owner)  # (of Dynamo's ConstantVariable)
        if type(new) not in (type(None), bool, int, float, str) or getattr(owner, name, written) != new:
            return False
    return True


def _is_own_keywords(variable: Any, code: CodeType) -> bool:
    """Whether a variable is the function's own ``**kwargs``, a dict that its caller does not see."""
    positional = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
    own = code.co_varnames[positional] if code.co_flags & 0x08 else None
    return type(variable.source).__name__ == "LocalSource" and variable.source.local_name == own


def _comes_with_arguments(source: Any) -> bool:
    while hasattr(source, "base"):
        source = source.base
    return type(source).__name__ == "LocalSource"


def break_before(model: nn.Module) -> GraphCompileReason | None:
    """Returns why Dynamo last broke a graph, where what it compiles is a piece of a model's code; None elsewhere."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    piece = tx is not None and tx.f_code not in _code_of_calls(model)
    return graph_break_reasons[-1] if piece and graph_break_reasons else None


def runs_one_graph(model: nn.Module, code: CodeType | None) -> bool:
    """Returns whether a call of a model is a call of the function with this code (of `code_without_effects`)."""
    if code is None or model._forward_hooks or model._forward_pre_hooks:
        return False
    return code in _code_of_calls(model)


def _code_of_calls(model: nn.Module) -> list[CodeType | None]:
    """Returns the code of the functions that a call of a model without hooks runs: its own call and its forward."""
    return [getattr(function, "__code__", None) for function in (model._call_impl, model.forward)]
