"""The door of continuous batching: the batch that calls of generate join, if a model has one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from river_compile.record import ModelRecord


class Batch(Protocol):
    """A batch that generate calls may join."""

    def join(self, call: Any, mode: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Generate a call's text; None if it has to run alone."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the batch waits."""
        ...


class OpenBatch:
    """The batch of a model, held weakly."""

    def __init__(self) -> None:
        self.ref: Callable[[], Batch | None] | None = None

    @property
    def batch(self) -> Batch | None:
        return None if self.ref is None else self.ref()

    def close(self) -> None:
        """Let calls run without a batch."""
        self.ref = None


def alone(record: ModelRecord) -> contextlib.AbstractContextManager[None]:
    """Inside, a call may use the model: its batch, if there is one, waits."""
    batch = record.of(OpenBatch).batch
    return contextlib.nullcontext() if batch is None else batch.alone()
