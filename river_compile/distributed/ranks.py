"""The processes that run one model together under tensor parallelism, and how they come to one decision.

Every rank runs the same program on its own shards, and the collectives of a step fit together only while all ranks run
the same blocks. What decides that (exit scores, drafted tokens, measured times) is computed from values that all ranks
hold, but rounding and clocks may differ, so the first rank's word counts. Objects of one rank alone return what they
are given.

Not handled: groups of several dimensions (data, pipeline or expert parallelism beside), which are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from river_compile.errors import ArtifactError, OptionError, RankError

T = TypeVar("T")

_FOLDERS = "rank-*-of-*"
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


@dataclass(frozen=True)
class Ranks:
    """The ranks of one model, seen from one of them; without arguments a model of this process alone."""

    rank: int = 0  # rank, size: the number of this one, from 0, and of all
    size: int = 1
    group: Any = None  # their process group
    # the kind of device that they exchange tensors of; the current one of it where there are several
    device: str = "cpu"
    several: bool = field(init=False)  # whether there are others

    def __post_init__(self) -> None:
        object.__setattr__(self, "several", self.size > 1)

    @property
    def name(self) -> str:
        """This rank's, "rank-0-of-2"."""
        return f"rank-{self.rank}-of-{self.size}"

    def first(self, value: Tensor) -> Tensor:
        """Returns the first rank's value of a tensor, which has the same shape and dtype on all of them."""
        if not self.several:
            return value
        agreed = value.detach().clone(memory_format=torch.contiguous_format)
        with self._exchange():
            dist.broadcast(agreed, group=self.group, group_src=0)
        return agreed

    def agree(self, values: Sequence[float]) -> Sequence[float]:
        """Returns the first rank's values of some numbers, as many on all of them."""
        if not self.several or not values:
            return values
        agreed: list[float] = self.first(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return agreed

    def every(self, holds: bool) -> bool:
        """Returns whether something holds on all ranks."""
        if not self.several:
            return holds
        least = torch.tensor(int(holds), dtype=torch.uint8, device=self.device)
        with self._exchange():
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return bool(least.item())

    def gather(self, value: T) -> list[T]:
        """Returns each rank's value, which can be pickled."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def explain(self, error: object) -> None:
        """Raises a RankError for an error that says that another rank is gone, or did not come in time."""
        if not isinstance(error, RuntimeError) or isinstance(error, RankError):
            return
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST):
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"{self.name}: another rank of this model ended, raised an error or did not come to an exchange in "
                f"time (its own message says why), so that this one cannot go on: {reason}"
            ) from error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.explain(error)
            raise

    def check_alike(self, what: str, value: object) -> None:
        """Makes sure that a value is the same on all ranks, to the bit.

        Raises:
            RankError: (on all ranks) it is not; the message has each one's.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            each = ", ".join(f"rank {i}: {other}" for i, other in enumerate(values))
            raise RankError(f"the {self.size} ranks of this model disagree about {what}: {each}")

    def folder(self, folder: str | Path) -> Path:
        """Returns the folder of this rank's part of an artifact: the artifact itself if there is one rank.

        Raises:
            ArtifactError: the artifact is of another number of ranks.
        """
        whole = Path(folder)
        others = sorted(_sizes(whole) - {str(self.size)})
        if others:
            raise ArtifactError(
                f"{whole} holds the twins of a model on {others[0]} ranks, and this one runs on {self.size}; start "
                f"{others[0]} processes, or leave artifact= out and save another one"
            )
        return whole / self.name if self.several else whole


def _sizes(folder: Path) -> set[str]:
    """Returns of how many ranks the artifacts in a folder are."""
    try:
        found = {path.name.rpartition("-")[2] for path in folder.glob(_FOLDERS)}
        return found | {"1"} if any(folder.glob("*.safetensors")) else found
    except (OSError, ValueError):  # (a name that no folder can have: whoever reads or writes there says so)
        return set()


ALONE = Ranks()


def ranks_of(tensors: Iterable[object]) -> Ranks:
    """Returns the ranks that share the parameters of a model.

    Raises:
        OptionError: they are shared along several dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    meshes: Iterator[Any] = (getattr(tensor, "device_mesh", None) for tensor in tensors)
    mesh = next((found for found in meshes if found is not None), None)
    if mesh is None or mesh.size() == 1:
        return ALONE
    if mesh.ndim > 1:
        raise OptionError(
            f"this model is spread over a mesh of {tuple(mesh.shape)} devices {mesh.mesh_dim_names}; backend 'river' "
            "knows tensor parallelism alone: use DistributedConfig(tp_size=...) without other sizes"
        )
    group = mesh.get_group()
    return Ranks(dist.get_rank(group), mesh.size(), group, mesh.device_type)
