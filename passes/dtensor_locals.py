"""Replaces DTensors in one rank's traced graph by local shards and functional collectives; the bits stay the same.

Not handled: shards of unequal width that are gathered; parameters that are not read by ``to_local()`` only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from river_compile.passes.edits import call
from river_compile.passes.nodes import called, is_parameter, is_reshape, memory_of, shape, value_of

_COLLECTIVES = torch.ops._c10d_functional
_ALIASES = (Tensor.detach, Tensor.view_as, torch.ops.aten.alias.default, torch.ops.aten.detach.default)


def is_shard(value: object) -> bool:
    """Whether a value is a DTensor, real or fake."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def is_collective(node: Argument, name: str) -> bool:
    """Whether a node calls the functional collective `name`, such as "all_reduce"."""
    packet = getattr(_COLLECTIVES, name)
    return called(node, packet, packet.default)


def on_local_shards(traced: fx.GraphModule, ranks: int, group: str) -> frozenset[fx.Node]:
    """Rewrite a normalized graph in place; return the placeholders that are local shards of the inputs now."""
    graph = traced.graph
    local = frozenset(node for node in graph.find_nodes(op="placeholder") if _read_as_local(node))
    for node in list(graph.nodes):
        if is_collective(node, "wait_tensor"):
            _without_copy(node)
        elif _calls(node, "from_local"):
            _as_gather(node, ranks, group)
    traced.recompile()
    return local


def _read_as_local(parameter: fx.Node) -> bool:
    """Replace ``to_local(p)`` by p, if p has no other users; return whether it did."""
    if not is_parameter(parameter) or not is_shard(value_of(parameter)) or not parameter.users:
        return False
    reads = list(parameter.users)
    if not all(_calls(user, "to_local") for user in reads):
        return False
    parameter.meta["example_value"] = value_of(reads[0])
    for read in reads:
        for same in (*_aliases(read), read):
            same.replace_all_uses_with(parameter)
            same.graph.erase_node(same)
    return True


def _aliases(node: fx.Node) -> Iterator[fx.Node]:
    """Yield aliases of the same memory and shape, the last ones first."""
    for user in list(node.users):
        alias = called(user, *_ALIASES) or is_reshape(user)
        if alias and user.args[0] is node and shape(user) == shape(node):
            yield from _aliases(user)
            yield user


def _without_copy(wait: fx.Node) -> None:
    """Replace x after ``x.copy_(wait(all_reduce(x)))`` by the sum, and erase the copy."""
    reduced = wait.args[0]
    if not is_collective(reduced, "all_reduce") or len(wait.users) != 1:
        return
    part, (copy,) = reduced.args[0], wait.users
    if not called(copy, Tensor.copy_) or copy.args[:2] != (part, wait):
        return
    after = [user for user in part.users if user not in (reduced, copy)]
    if part.op != "placeholder" and memory_of(part) is part and all(user > copy for user in after):
        for user in after:
            user.replace_input_with(part, wait)
        copy.replace_all_uses_with(wait)
        copy.graph.erase_node(copy)


def _as_gather(shards: fx.Node, ranks: int, group: str) -> None:
    """Replace ``from_local(x, Shard(-1)).redistribute(Replicate).to_local()`` by an all-gather of equal shards."""
    whole = _only_user(shards, "redistribute")
    result = None if whole is None else _only_user(whole, "to_local")
    if whole is None or result is None:
        return
    x, _, (before,) = shards.args[:3]
    (after,) = whole.kwargs.get("placements") or whole.args[2]
    last = value_of(x).dim() - 1
    split = type(before).__name__ == "Shard" and before.dim in (-1, last)
    if not split or not after.is_replicate() or value_of(x).shape[-1] * ranks != value_of(result).shape[-1]:
        return
    order = (*range(1, last + 1), 0, last + 1)
    with shards.graph.inserting_before(result):
        one = value_of(x).unsqueeze(0)
        every = one.new_empty((ranks, *one.shape[1:]))
        part = call(torch.unsqueeze, (x, 0), one, result)
        gathered = call(_COLLECTIVES.all_gather_into_tensor.default, (part, ranks, group), every, result)
        waited = call(_COLLECTIVES.wait_tensor.default, (gathered,), every, result)
        side_by_side = call(torch.permute, (waited, order), every.permute(order), result)
        joined = call(torch.flatten, (side_by_side, -2, -1), value_of(result), result)
    result.replace_all_uses_with(joined)
    for node in (result, whole, shards):
        node.graph.erase_node(node)


def _only_user(node: fx.Node, name: str) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and _calls(users[0], name) else None


def _calls(node: fx.Node, name: str) -> bool:
    called_name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and called_name == name
