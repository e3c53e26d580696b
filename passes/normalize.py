"""Brings a traced graph into a normal form: one spelling of each operation (`_TABLE`), positional arguments, same bits.

Floats are constants, also those that Dynamo made an input because another model of the class has other ones.

Not handled: calls that the table does not cover (``alpha=``, ``out=``, ``memory_format=``), methods of other objects.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from river_compile.passes.nodes import WITH_INPLACE, is_tensor, rank, value_of

Arguments = tuple[tuple, Mapping[str, object]]
Form = Callable[[tuple, Mapping[str, object]], Arguments | None]


def normalized(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a traced graph in the normal form, with the same names and metadata."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node | float] = {}
    for node in graph_module.graph.nodes:
        value = value_of(node)
        if _varies_with_models(value):
            new[node] = float(value)  # under a guard: kernels take scales and epsilons as numbers
        else:
            new[node] = copy = graph.node_copy(node, lambda n: new[n])
            _normalize(copy)
    return fx.GraphModule(graph_module, graph)


def _varies_with_models(value: object) -> bool:
    """Whether a float is an attribute of a module, or computed from such alone; no size of the inputs is in it."""
    if not isinstance(value, torch.SymFloat):
        return False
    symbols = value.node.expr.free_symbols
    return all(symbol_is_type(symbol, SymT.FLOAT) for symbol in symbols)


def _normalize(node: fx.Node) -> None:
    function = _function(node)
    if function is None:
        return
    args = node.args[:1] if function is Tensor.t else node.args  # getattr(x, "T") has a second argument
    node.op, node.target, node.args = "call_function", function, args
    if function in _NORMAL:
        normal, form = _NORMAL[function]
        found = form(args, node.kwargs)
        # The same operators on numbers stay.
        if found is not None and (isinstance(found[0][0], (tuple, list)) or is_tensor(found[0][0])):
            node.target = normal
            node.args, node.kwargs = found


def _function(node: fx.Node) -> Callable | None:
    """Return the function that a node calls, as a function or as a tensor's method; None for other nodes."""
    if node.op == "call_method" and is_tensor(node.args[0]):
        return getattr(Tensor, node.target, None)
    if node.op != "call_function":
        return None
    if node.target is getattr and node.args[1:] == ("T",) and rank(node.args[0]) == 2:
        return Tensor.t
    return node.target


def _like(example: Callable) -> Form:
    """Bind arguments to the parameters and defaults of `example`."""
    signature = inspect.signature(example)

    def form(args: tuple, kwargs: Mapping[str, object]) -> Arguments | None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return bound.args, bound.kwargs

    return form


def _sizes(args: tuple, kwargs: Mapping[str, object]) -> Arguments | None:
    """Join sizes or dimensions that are given one by one; a view as another dtype has none."""
    given: list[object] = [*args, *kwargs.values()]
    x, *sizes = given
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return (x, tuple(sizes[0])), {}
    numbers = all(isinstance(value_of(n) if isinstance(n, fx.Node) else n, (int, torch.SymInt)) for n in sizes)
    return ((x, tuple(sizes)), {}) if sizes and numbers else None


def _to(args: tuple, kwargs: Mapping[str, object]) -> Arguments | None:
    """Make device and dtype positional if there are no other arguments."""
    named = [value for name in ("device", "dtype") if (value := kwargs.get(name)) is not None]
    together = len(args) == 1 if "device" in kwargs else len(args) <= 2
    known = set(kwargs) <= {"device", "dtype"} and (together or not kwargs) and len(args) + len(named) > 1
    return ((*args, *named), {}) if known else None


def _with(value: object) -> Form:
    return lambda args, kwargs: ((*args, value), {}) if len(args) == 1 and not kwargs else None


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Have the signature of ``scaled_dot_product_attention``, a builtin that `inspect` cannot read."""


_unary = _like(lambda input: input)
_binary = _like(lambda input, other: input)

# normal form, the form of its arguments, other spellings
_TABLE: tuple[tuple, ...] = (
    (operator.add, _binary, torch.add, Tensor.add),
    (operator.sub, _binary, torch.sub, Tensor.sub),
    (operator.mul, _binary, torch.mul, torch.multiply, Tensor.mul, Tensor.multiply),
    (operator.truediv, _binary, torch.div, torch.true_divide, Tensor.div, Tensor.true_divide),
    (operator.matmul, _binary, torch.matmul, Tensor.matmul),
    (torch.bmm, _like(lambda input, mat2: input), Tensor.bmm),
    (operator.pow, _binary, torch.pow, Tensor.pow),
    (operator.pow, _with(2), torch.square, Tensor.square),
    (operator.neg, _unary, torch.neg, torch.negative, Tensor.neg, Tensor.negative),
    (Tensor.add_, _binary, operator.iadd),
    (Tensor.sub_, _binary, operator.isub),
    (Tensor.mul_, _binary, operator.imul),
    (Tensor.div_, _binary, operator.itruediv),
    (Tensor.index_copy_, _like(lambda input, dim, index, source: input)),
    (torch.rsqrt, _unary, Tensor.rsqrt),
    (torch.tanh, _unary, Tensor.tanh),
    *((function, _like(function)) for function in WITH_INPLACE),
    (F.relu, _like(F.relu), torch.relu, Tensor.relu),
    (F.gelu, _like(lambda input, *, approximate="none": input)),
    (F.linear, _like(lambda input, weight, bias=None: input)),
    (torch.addmm, _like(lambda input, mat1, mat2: input), Tensor.addmm),
    (F.layer_norm, _like(lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: input)),
    (F.rms_norm, _like(lambda input, normalized_shape, weight=None, eps=None: input), torch.rms_norm),
    (torch.softmax, _like(lambda input, dim, *, dtype=None: input), F.softmax, Tensor.softmax),
    (F.scaled_dot_product_attention, _like(_attention)),
    (torch.mean, _like(lambda input, dim, keepdim=False, *, dtype=None: input), Tensor.mean),
    (torch.cat, _like(lambda tensors, dim=0: tensors), torch.concat, torch.concatenate),
    (torch.stack, _like(lambda tensors, dim=0: tensors)),
    (torch.split, _like(lambda input, split_size, dim=0: input), Tensor.split),
    (torch.chunk, _like(lambda input, chunks, dim=0: input), Tensor.chunk),
    (torch.topk, _like(lambda input, k, dim=-1, largest=True, sorted=True: input), Tensor.topk),
    (torch.roll, _like(lambda input, shifts, dims=(): input), Tensor.roll),
    (Tensor.view, _sizes),
    (torch.reshape, _sizes, Tensor.reshape),
    (Tensor.expand, _sizes),
    (torch.permute, _sizes, Tensor.permute),
    (torch.transpose, _like(lambda input, dim0, dim1: input), Tensor.transpose, torch.swapaxes, Tensor.swapaxes),
    (torch.t, _unary, Tensor.t),
    (torch.flatten, _like(lambda input, start_dim=0, end_dim=-1: input), Tensor.flatten),
    (torch.unsqueeze, _like(lambda input, dim: input), Tensor.unsqueeze),
    (torch.squeeze, _like(lambda input, *dim: input), Tensor.squeeze),
    (torch.narrow, _like(lambda input, dim, start, length: input), Tensor.narrow),
    (torch.select, _like(lambda input, dim, index: input), Tensor.select),
    (Tensor.to, _to),
    (Tensor.to, _binary, Tensor.type_as),
    (Tensor.to, _with(torch.float32), Tensor.float),
    (Tensor.to, _with(torch.float16), Tensor.half),
    (Tensor.to, _with(torch.bfloat16), Tensor.bfloat16),
)


_NORMAL: dict[Callable, tuple[Callable, Form]] = {
    **{target: (target, form) for target, form, *_ in reversed(_TABLE)},
    **{spelling: (target, form) for target, form, *spellings in _TABLE for spelling in spellings},
}
