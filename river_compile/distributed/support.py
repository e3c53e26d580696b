"""Refuses unsupported tensor parallelism before anything is packed, and makes the plan that works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from transformers import PretrainedConfig

from river_compile.config import RiverConfig
from river_compile.distributed.ranks import Ranks
from river_compile.errors import OptionError
from river_compile.passes.dtensor_locals import is_shard
from river_compile.passes.nodes import called, value_of
from river_compile.upstream.tensors import local_of

NOT_CAPTURED = "tensor parallelism: collectives inside of captured graphs were not tried on a GPU yet"


def tensor_parallel_plan(config: PretrainedConfig, ranks: int) -> dict[str, str]:
    """Returns the changes to a model's own plan with which it runs compiled on so many ranks.

    For ``DistributedConfig(tp_size=ranks, tp_plan=tensor_parallel_plan(config, ranks))``: every rank holds the
    embedding (and the head, where that is the same matrix), and attention too where the ranks do not divide its heads.

    Args:
        config: of a decoder whose modules are called as Llama's are.
        ranks: processes.
    """
    text = config.get_text_config()
    plan = {"model.embed_tokens": "replicate"}
    if getattr(text, "tie_word_embeddings", False):
        plan["lm_head"] = "replicate"
    heads = (text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if any(count % ranks for count in heads):
        own: dict[str, str] = text.base_model_tp_plan or {}
        plan |= {f"model.{name}": "replicate" for name in own if ".self_attn." in name}
    return plan


def check(ranks: Ranks, config: RiverConfig, mode: str | None, traced: fx.Graph) -> None:
    """Checks the options of a model on several ranks.

    Raises:
        OptionError: something that does not work there; the message names the fix.
    """
    for problem in (*_options(config, mode), *_embeddings(traced.nodes)):
        raise OptionError(f"{problem} (this model is spread over {ranks.size} ranks)")


def _options(config: RiverConfig, mode: str | None) -> Iterator[str]:
    if config.offload is not None:
        yield (
            f"offload={config.offload} is not available under tensor parallelism, where each rank holds a share of "
            "every block; leave it out, or use more ranks"
        )
    if config.cudagraphs or mode in ("reduce-overhead", "max-autotune"):
        asked = f"cudagraphs={config.cudagraphs!r}" if config.cudagraphs else f"mode={mode!r}"
        yield f"{asked} is not available under {NOT_CAPTURED}; leave it out"


def _embeddings(nodes: Iterable[fx.Node]) -> Iterator[str]:
    """Yields tables that torch fails at in the next graph: looked up in parts, under dynamic sizes."""
    dynamo: Any = torch._dynamo.config
    if dynamo.automatic_dynamic_shapes and any(
        called(node, F.embedding) and any(is_shard(value_of(n)) for n in node.all_input_nodes) for node in nodes
    ):
        yield (
            "the embedding's rows are spread over the ranks, at which torch.compile fails with the first token after "
            "the prompt ('unhashable type: non-nested SymInt'); load the model with DistributedConfig(tp_size=..., "
            "tp_plan=river_compile.tensor_parallel_plan(config, tp_size)), which keeps the embedding whole"
        )


def called_on_shards(
    executor: Callable[..., Any], placeholders: Sequence[fx.Node], local: frozenset[fx.Node]
) -> Callable[..., Any]:
    """Returns an executor as Dynamo calls it: with parameters whose local shards are the graph's inputs.

    Args:
        executor: takes the shards, and None for tensors that its graph does not use.
        placeholders: of the graph, in order.
        local: those that stand for shards. None: the executor is returned.
    """
    if not local:
        return executor
    places = [i for i, node in enumerate(placeholders) if node in local]
    unused = [
        i
        for i, node in enumerate(placeholders)
        if not node.users and node not in local and isinstance(value_of(node), torch.Tensor)
    ]

    def call(*args: Any) -> Any:
        mine = list(args)
        for place in places:
            mine[place] = local_of(mine[place])
        for place in unused:
            mine[place] = None
        return executor(*mine)

    return call
