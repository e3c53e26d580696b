"""A model's programs from earlier processes, run without Dynamo, and those of this one, kept for later ones.

A pass has a *signature*: whether it is a prompt, how full sliding windows are, and what its inputs are but for their
sizes. Of the stored passes of a signature the first one that fits the inputs' sizes is built, once in a process.

Not handled (such passes go through Dynamo in every process): caches that grow, devices other than a CPU, ranks that
share a model, offloaded blocks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.config import RiverConfig
from river_compile.runtime.executor import RiverExecutor
from river_compile.store.folder import Entry, enabled, keep_bound
from river_compile.store.graphs import NotStorable, dumps, loads
from river_compile.store.identity import identity_of
from river_compile.store.stored_pass import StoredPass, named

log = logging.getLogger("river_compile.store")
_ENDING = ".pass"
_LEARNED = "learned.json"
# Builds a stored program: (what is stored, the graph's inputs) -> what runs it.
Build = Callable[[StoredPass, list[Any]], RiverExecutor]


class Recalled(NamedTuple):
    """A pass that was found: what runs it, its graph's inputs, and what is stored of it."""

    executor: RiverExecutor
    args: list[Any]
    stored: StoredPass


@dataclass
class _Known:
    stored: StoredPass
    executor: RiverExecutor | None = None


class Programs:
    """The stored programs of one accelerated model.

    Args:
        config: what the model is compiled with.
        build: builds a program.
    """

    def __init__(self, config: RiverConfig, build: Build) -> None:
        self._options = replace(config, artifact=None, on_missing_artifact="raise")
        self._build = build
        self._usable = config.dump_dir is None and config.offload is None
        self._identity: str | None = None
        self._known: dict[str, list[_Known]] = {}
        self._kept: set[tuple[str, int]] = set()
        self._new: list[tuple[str, StoredPass]] = []
        self._lock = threading.Lock()  # (threads may generate with one model)
        self._calls = 0
        self._about = ""

    def begin(self, model: PreTrainedModel) -> bool:
        """Looks at a model at the beginning of a call; returns whether programs can be recalled and kept for it."""
        if not (self._usable and enabled() and model.device.type == "cpu"):
            return False
        identity = identity_of(model, self._options)
        with self._lock:
            if identity != self._identity:
                size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                self._about = f"programs of {type(model).__name__}, {size:.0f}M parameters"
                self._identity, self._known, self._kept, self._new, self._calls = identity, {}, set(), [], 0
        return identity is not None

    def recall(self, model: PreTrainedModel, kind: object, inputs: Mapping[str, Any], cache: Cache) -> Recalled | None:
        """Returns a pass for inputs of a model's forward; None if none is stored."""
        assert self._identity is not None, "begin() found an identity"
        with self._lock:
            return self._find(_signature(kind, inputs, cache), model, inputs, cache)

    def _find(self, signature: str, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Recalled | None:
        entry = Entry(str(self._identity))
        if signature not in self._known:
            self._known[signature] = [*map(_Known, _read(entry, signature))]
        for known in self._known[signature]:
            args = known.stored.arguments(model, inputs, cache)
            if args is None:
                continue
            if known.executor is None:
                known.executor = self._build(known.stored, args)
                entry.used()
            return Recalled(known.executor, args, known.stored)
        return None

    def keep(
        self,
        kind: object,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        cache: Cache,
        executor: RiverExecutor,
        args: Sequence[Any],
        logits: int,
        matrices: tuple[str, ...],
    ) -> None:
        """Has a pass stored that Dynamo traced in this call, with the graph's inputs; see :class:`StoredPass`."""
        kept = _signature(kind, inputs, cache), id(executor)
        if kept in self._kept:  # (one graph may serve several widths)
            return
        self._kept.add(kept)
        try:
            stored = StoredPass.of(
                executor.program, executor.inputs, matrices, logits, model=model, args=args, inputs=inputs, cache=cache
            )
        except NotStorable as why:
            log.info("a pass is not stored: %s", why)
        else:
            self._new.append((kept[0], stored))

    def learned(self) -> Any:
        """Returns what earlier processes learned of passes and drafts, None where they left nothing."""
        assert self._identity is not None, "begin() found an identity"
        entry = Entry(self._identity)
        content = entry.read(_LEARNED)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            entry.damaged(_LEARNED, error)
            return None

    def write(self, learned: Callable[[], Any]) -> None:
        """Writes, at the end of a call, what is to be stored, and after calls 1, 2, 4, 8 ... what was `learned`."""
        with self._lock:
            new, self._new = self._new, []
            self._calls += 1
            identity, due = self._identity, not self._calls & (self._calls - 1)
        if identity is None:
            return
        entry = Entry(identity, self._about)
        for signature, stored in new:
            try:
                content = dumps(stored)
            except NotStorable as why:
                log.info("a pass is not stored: %s", why)
                continue
            entry.write(f"{signature}-{hashlib.sha256(content).hexdigest()[:16]}{_ENDING}", content)
        if due:
            entry.write(_LEARNED, json.dumps(learned()).encode(), anew=True)
        if new or due:
            keep_bound()


def _read(entry: Entry, signature: str) -> list[StoredPass]:
    found = []
    for name in entry.names(_ENDING):
        content = entry.read(name) if name.startswith(signature) else None
        if content is None:
            continue
        try:
            found.append(loads(content))
        except NotStorable as why:
            log.info("%s is left out: %s", name, why)
        except Exception as error:  # (whatever bytes of another kind lead to)
            entry.damaged(name, f"{type(error).__name__}: {error}")
    return found


def _signature(kind: object, inputs: Mapping[str, Any], cache: Cache) -> str:
    def of(value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, value.dim()
        return type(value).__qualname__ if isinstance(value, Cache) else value

    arguments = sorted((str(name), str(of(value))) for name, value in named(inputs))
    layers = [type(layer).__qualname__ for layer in cache.layers]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return hashlib.sha256(repr((kind, arguments, layers, modes)).encode()).hexdigest()[:24]
