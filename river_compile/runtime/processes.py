"""The processes that share a model; the door of tensor parallelism, which is not imported before it is needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from river_compile.agreement import ALONE, Agreement


def processes_of(parameters: Iterable[object]) -> Agreement:
    """Return the agreement of the processes that share a model's parameters."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    from river_compile.runtime.tensor_parallel import ranks_of

    return ranks_of(parameters)
