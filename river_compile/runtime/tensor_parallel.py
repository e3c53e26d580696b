"""Tensor parallelism: the plan for a model, checks of unsupported options, and graphs on a rank's shards.

How ranks agree is in river_compile/ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from transformers import PretrainedConfig

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.passes.dtensor_locals import is_shard
from river_compile.passes.nodes import called, value_of
from river_compile.ranks import NOT_CAPTURED, Ranks
from river_compile.upstream.tensors import local_of


def tensor_parallel_plan(config: PretrainedConfig, ranks: int) -> dict[str, str]:
    """Return the changes to a model's own plan with which it compiles for tensor parallelism.

    For ``DistributedConfig(tp_size=ranks, tp_plan=tensor_parallel_plan(config, ranks))``. Every rank holds the
    embedding, the head if their weights are tied, and attention if its heads cannot be divided by the ranks.

    Args:
        config: of a decoder whose modules have the names of Llama's.
        ranks: number of processes.
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


def check_supported(ranks: Ranks, config: RiverConfig, mode: str | None, traced: fx.Graph) -> None:
    """Raise an OptionError for options and embeddings that do not work on several ranks."""
    for problem in (*_unsupported_options(config, mode), *_unsupported_embeddings(traced.nodes)):
        raise OptionError(f"{problem} This model is spread over {ranks.size} ranks", id="RC122")


def _unsupported_options(config: RiverConfig, mode: str | None) -> Iterator[str]:
    if config.offload is not None:
        yield (
            f"offload={config.offload} is not available under tensor parallelism, where each rank holds a share of "
            "every block. Remove it, or use more ranks."
        )
    if config.graphs or mode in ("reduce-overhead", "max-autotune"):
        asked = f"graphs={config.graphs!r}" if config.graphs else f"mode={mode!r}"
        yield f"{asked} is not available under {NOT_CAPTURED}. Remove it."


def _unsupported_embeddings(nodes: Iterable[fx.Node]) -> Iterator[str]:
    """Yield a problem for sharded embeddings, at which torch fails in the next graph under dynamic sizes."""
    dynamo: Any = torch._dynamo.config
    if dynamo.automatic_dynamic_shapes and any(
        called(node, F.embedding) and any(is_shard(value_of(n)) for n in node.all_input_nodes) for node in nodes
    ):
        yield (
            "the embedding's rows are spread over the ranks, so torch.compile fails with the first token after the "
            "prompt ('unhashable type: non-nested SymInt'). Load the model with DistributedConfig(tp_size=..., "
            "tp_plan=river_compile.tensor_parallel_plan(config, tp_size)), which keeps the embedding whole."
        )


def take_local_shards(
    executor: Callable[..., Any], placeholders: Sequence[fx.Node], local: frozenset[fx.Node]
) -> Callable[..., Any]:
    """Wrap an executor of local shards for Dynamo, which passes DTensors for the placeholders in `local`."""
    if not local:
        return executor
    places = [i for i, node in enumerate(placeholders) if node in local]
    idle = [i for i, n in enumerate(placeholders) if not n.users and n not in local and isinstance(value_of(n), Tensor)]

    def call(*args: Any) -> Any:
        mine = list(args)
        for place in places:
            mine[place] = local_of(mine[place])
        for place in idle:
            mine[place] = None
        return executor(*mine)

    return call
