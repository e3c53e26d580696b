"""What River knows of each model that it has seen: an object of each type that keeps something between calls.

A model is found by its parameters, which are held weakly, so its record goes with them. This registry is the package's
only global state of models.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import OptionError

T = TypeVar("T")


class ModelRecord:
    """A bag by type: each part of River keeps its object of a model here, and knows no other part's."""

    def __init__(self) -> None:
        self._held: dict[type, Any] = {}

    def of(self, kind: type[T]) -> T:
        """Return the object of a type; a new one, made without arguments, if there is none."""
        if kind not in self._held:
            self._held[kind] = kind()
        found: T = self._held[kind]
        return found

    def find(self, kind: type[T]) -> T | None:
        """Return the object of a type, None if there is none."""
        return self._held.get(kind)

    def put(self, *objects: object) -> None:
        """Hold objects, in the place of others of their types."""
        self._held |= {type(held): held for held in objects}

    def put_as(self, kind: type[T], held: T) -> None:
        """Hold an object in the place of one of its base class."""
        self._held[kind] = held

    def drop(self, *kinds: type) -> None:
        """Let go the objects of some types."""
        for kind in kinds:
            self._held.pop(kind, None)


_records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def record_of(parameters: Iterable[object]) -> ModelRecord:
    """Return the record of the model that owns these parameters, a new one if there is none."""
    tensors = [p for p in parameters if isinstance(p, Tensor)]
    with _lock:
        record = _find(tensors) or ModelRecord()
        for tensor in tensors:
            _records[tensor] = record
        return record


def adopt(record: ModelRecord, parameters: Iterable[Tensor]) -> None:
    """Add parameters that replaced some of a model's."""
    with _lock:
        for tensor in parameters:
            _records[tensor] = record


def forget(model: nn.Module) -> None:
    """Drop a model's record, and with it all that River keeps of the model."""
    with _lock:
        for tensor in (*model.parameters(), *model.buffers()):
            _records.pop(tensor, None)


def find_record(model: nn.Module) -> ModelRecord | None:
    """Return the record of a model or of the model in torch.compile's wrapper, None if there is none."""
    module = unwrap(model)
    return _find([*module.parameters(), *module.buffers()])


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module in torch.compile's wrapper, or the module itself; raise an OptionError for other objects."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"The model must be a torch.nn.Module, got {type(model).__name__}", id="RC006")
    return getattr(model, "_orig_mod", model)


def _find(tensors: Iterable[Tensor]) -> ModelRecord | None:
    return next((record for record in map(_records.get, tensors) if record is not None), None)
