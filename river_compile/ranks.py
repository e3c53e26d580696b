"""The processes that share a model, and how they agree; one process agrees with itself.

The collectives of a step match only while all ranks run the same blocks, so the first rank's values decide.
Not handled: meshes of several dimensions (data, pipeline or expert parallelism), which raise an OptionError.
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

from river_compile.errors import OptionError, RankError, TwinsError

T = TypeVar("T")
NOT_CAPTURED = "tensor parallelism: collectives inside of captured graphs were not tried on a GPU yet"
_FOLDERS = "rank-*-of-*"
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in errors of a rank that is gone


@dataclass(frozen=True)
class Ranks:
    """The ranks of one model, seen from one of them; the default is a model of this process alone."""

    rank: int = 0
    size: int = 1
    group: Any = None  # process group
    device: str = "cpu"  # type of the device for exchanged tensors; of several devices the current one
    several: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "several", self.size > 1)

    @property
    def name(self) -> str:
        return f"rank-{self.rank}-of-{self.size}"

    def first(self, value: Tensor) -> Tensor:
        """Return the first rank's tensor, whose shape and dtype are the same on all ranks."""
        if not self.several:
            return value
        agreed = value.detach().clone(memory_format=torch.contiguous_format)
        with self._exchange():
            dist.broadcast(agreed, group=self.group, group_src=0)
        return agreed

    def agree(self, values: Sequence[float]) -> Sequence[float]:
        """Return the first rank's numbers; all ranks have the same number of them."""
        if not self.several or not values:
            return values
        agreed: list[float] = self.first(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return agreed

    def every(self, condition: bool) -> bool:
        """True if a condition is true on all ranks."""
        if not self.several:
            return condition
        least = torch.tensor(int(condition), dtype=torch.uint8, device=self.device)
        with self._exchange():
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return bool(least.item())

    def gather(self, value: T) -> list[T]:
        """Return each rank's value, which must be picklable."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def check_alike(self, what: str, value: object) -> None:
        """Raise a RankError on all ranks, with each rank's value, unless the values are equal."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            each = ", ".join(f"rank {i}: {other}" for i, other in enumerate(values))
            raise RankError(
                f"The {self.size} ranks of this model disagree about {what}: {each}. Give every rank the same arguments"
            )

    def raise_if_lost(self, error: object) -> None:
        """Raise a RankError for an error of torch that means a rank is gone or an exchange timed out."""
        if not isinstance(error, RuntimeError) or isinstance(error, RankError):
            return
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST):
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"{self.name} cannot continue: another rank of this model ended, failed or missed an exchange. "
                f"Its own message says why. Here torch said: {reason}",
                id="RC121",
            ) from error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def folder(self, folder: str | Path) -> Path:
        """Return the folder of this rank's saved twins; raise a TwinsError if their number of ranks differs."""
        whole = Path(folder)
        others = sorted(_saved_sizes(whole) - {str(self.size)})
        if others:
            raise TwinsError(
                f"{whole} holds the twins of a model on {others[0]} ranks, and this one runs on {self.size}. Start "
                f"{others[0]} processes, or save its twins to another folder without twins=",
                id="RC047",
            )
        return whole / self.name if self.several else whole


ALONE = Ranks()


def _saved_sizes(folder: Path) -> set[str]:
    """Return the numbers of ranks whose twins are saved in a folder."""
    try:
        found = {path.name.rpartition("-")[2] for path in folder.glob(_FOLDERS)}
        return found | {"1"} if any(folder.glob("*.safetensors")) else found
    except (OSError, ValueError):  # an impossible name is reported by the code that reads or writes there
        return set()


def ranks_of(tensors: Iterable[object]) -> Ranks:
    """Return the ranks that share parameters; raise an OptionError for a mesh of several dimensions."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
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
