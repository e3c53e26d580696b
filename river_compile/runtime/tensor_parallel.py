"""Tensor parallelism: the ranks of one model, their agreement, and graphs on a rank's shards.

Not handled: meshes of several dimensions (data, pipeline or expert parallelism); the options that
:meth:`Ranks.fitted` refuses, such as quantizers with statistics, which ranks would have to take together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx
from transformers import PretrainedConfig

from river_compile.agreement import ALONE, PARTS, Agreement
from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RankError, RiverWarning, TwinsError
from river_compile.kernels.messages import with_id
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.passes.dtensor_locals import is_shard, on_local_shards
from river_compile.passes.experts import ROUTER
from river_compile.passes.nodes import called, value_of
from river_compile.passes.program import Program
from river_compile.upstream.tensors import local_of

T = TypeVar("T")
_NOT_CAPTURED = "tensor parallelism: collectives inside of captured graphs were not tried on a GPU yet"
_QUANTIZER = "hqq"  # by default: the best without statistics
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in errors of a rank that is gone


def tensor_parallel_plan(config: PretrainedConfig, ranks: int) -> dict[str, str]:
    """Return the changes to a model's own plan with which it compiles for tensor parallelism.

        plan = river_compile.tensor_parallel_plan(model.config, ranks=2)

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


def ranks_of(tensors: Iterable[object]) -> Agreement:
    """Return the ranks that share parameters, or `ALONE`; raise an OptionError for a mesh of several dimensions."""
    meshes: Iterator[Any] = (getattr(tensor, "device_mesh", None) for tensor in tensors)
    mesh = next((found for found in meshes if found is not None), None)
    if mesh is None or mesh.size() == 1:
        return ALONE
    if mesh.ndim > 1:
        raise OptionError(
            f"this model is spread over a mesh of {tuple(mesh.shape)} devices {mesh.mesh_dim_names}; backend 'river' "
            "supports tensor parallelism only. Use DistributedConfig(tp_size=...) without other sizes",
            id="RC122",
        )
    group = mesh.get_group()
    return Ranks(dist.get_rank(group), mesh.size(), group, mesh.device_type)


@dataclass(frozen=True)
class Ranks(Agreement):
    """The ranks of one model, seen from one of them."""

    rank: int
    size: int
    group: Any = None  # process group
    device: str = "cpu"  # type of the device for exchanged tensors; of several devices the current one
    several = True
    not_captured = _NOT_CAPTURED

    @property
    def name(self) -> str:
        return f"rank-{self.rank}-of-{self.size}"

    def first(self, value: Tensor) -> Tensor:
        agreed = value.detach().to(self.device).clone(memory_format=torch.contiguous_format)
        with self._exchange():
            dist.broadcast(agreed, group=self.group, group_src=0)
        return agreed.to(value.device)

    def every(self, condition: bool) -> bool:
        least = torch.tensor(int(condition), dtype=torch.uint8, device=self.device)
        with self._exchange():
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return bool(least.item())

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def part_of(self, folder: Path) -> Path:
        others = sorted(_saved_sizes(folder) - {str(self.size)})
        if others:
            raise TwinsError(
                f"{folder} holds the twins of a model on {others[0]} ranks, and this one runs on {self.size}. Start "
                f"{others[0]} processes, or save its twins to another folder without twins=",
                id="RC047",
            )
        return folder / self.name

    def explain(self, error: BaseException) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, RankError):
            return
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST):
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"{self.name} cannot continue: another rank of this model ended, failed or missed an exchange. "
                f"Its own message says why. Here torch said: {reason}"
            ) from error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.explain(error)
            raise

    def fitted(self, config: RiverConfig, given: Collection[str]) -> RiverConfig:
        if "quantizer" not in given:
            config = replace(config, quantizer=_QUANTIZER)
        if config.target_weights == "auto":
            config = replace(config, target_weights="model")
        for problem in _unsupported_options(config):
            raise self._refusal(problem)
        return config if config.twins is None else replace(config, twins=self.part_of(Path(config.twins)))

    def take_shards(self, traced: fx.GraphModule, values: dict[fx.Node, Any], mode: str | None) -> frozenset[fx.Node]:
        if mode in ("reduce-overhead", "max-autotune"):
            raise self._refusal(f"mode={mode!r} is not available under {_NOT_CAPTURED}. Remove it.")
        for problem in _unsupported_embeddings(traced.graph.nodes):
            raise self._refusal(problem)
        local = on_local_shards(traced, self.size, self.group.group_name)
        values |= {node: local_of(values[node]) for node in local}
        return local

    def wrap(
        self,
        executor: Callable[..., Any],
        program: Program,
        placeholders: Sequence[fx.Node],
        local: frozenset[fx.Node],
    ) -> Callable[..., Any]:
        self._warn_of_16_bits(program)
        if not local:
            return executor
        places = [i for i, node in enumerate(placeholders) if node in local]
        idle = [
            i for i, n in enumerate(placeholders) if not n.users and n not in local and isinstance(value_of(n), Tensor)
        ]

        def call(*args: Any) -> Any:
            mine = list(args)
            for place in places:
                mine[place] = local_of(mine[place])
            for place in idle:
                mine[place] = None
            return executor(*mine)

        return call

    def _refusal(self, problem: str) -> OptionError:
        return OptionError(f"{problem} This model is spread over {self.size} ranks", id="RC122")

    def _warn_of_16_bits(self, program: Program) -> None:
        """Warn of weights of the twins that stay in 16 bits, routers aside."""
        kept = [linear for linear in program.kept if linear.reason != ROUTER]
        if kept and program.twins:
            warnings.warn(
                with_id(
                    "RC049",
                    f"{len(kept)} matrices of the twins stay in 16 bits on {self.name} ({program.kind} graph). Each "
                    "rank's share of them cannot be quantized, so drafts read more bytes. The first is "
                    f"{kept[0].name}: {kept[0].reason}",
                ),
                RiverWarning,
                stacklevel=2,
            )


def _saved_sizes(folder: Path) -> set[str]:
    """Return the numbers of ranks whose twins are saved in a folder."""
    try:
        found = {path.name.rpartition("-")[2] for path in folder.glob(PARTS)}
        return found | {"1"} if any(folder.glob("*.safetensors")) else found
    except (OSError, ValueError):  # an impossible name is reported by the code that reads or writes there
        return set()


def _unsupported_options(config: RiverConfig) -> Iterator[str]:
    if config.quantizer in OBSERVING:
        yield (
            f"quantizer={config.quantizer!r} needs statistics of inputs, which ranks do not take together. Use "
            f"quantizer={_QUANTIZER!r}, the default there, or 'rtn'."
        )
    if config.target_weights != "model":
        yield f"target_weights={config.target_weights!r} is not available under tensor parallelism. Use 'model'."
    if config.offload is not None:
        yield (
            f"offload={config.offload} is not available under tensor parallelism, where each rank holds a share of "
            "every layer. Remove it, or use more ranks."
        )
    if config.graphs:
        yield f"graphs={config.graphs!r} is not available under {_NOT_CAPTURED}. Remove it."


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
