"""A model's programs: those that Dynamo traced in this process, those of earlier ones, and those that follow from them.

A pass has a *signature*: whether it is of one token, and what its inputs are but for their sizes. Of the known passes
of a signature the first one that fits the inputs' sizes runs; those in the store are read when their signature first
comes, and the one that fits is built, once in a process. A pass of one token follows from one of several, and Dynamo
need not trace it.

Not handled (such passes go through Dynamo in every process): caches that grow, devices other than a CPU, ranks that
share a model, offloaded blocks.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.config import RiverConfig
from river_compile.kernels.native.build import CannotBuild
from river_compile.passes.program import Program, RiverProgram
from river_compile.runtime.executor import RiverExecutor
from river_compile.store.codec import NotStorable, dumps, loads
from river_compile.store.folder import Entry, enabled, keep_bound
from river_compile.store.inputs import arguments, named, of_one_token
from river_compile.upstream.transformers import is_of_transformers

log = logging.getLogger("river_compile.store")
_ENDING = ".pass"
Bindable = tuple[RiverExecutor, list[Any]]  # what runs a pass, and the inputs of its program
Origin = Literal["traced", "stored", "derived"]
# Builds a program, or rewrites a decoder first: (what, the names of its inputs, their values, its origin) -> what runs
# it.
Build = Callable[[Program | RiverProgram, Sequence[str], Sequence[Any], Origin], RiverExecutor]


@dataclass
class _Known:
    """A program, and what returns its executor: None where there is none yet, or none any more.

    Attributes:
        traced: the decoder that Dynamo traced in this process, None for others.
    """

    program: Program
    executor: Callable[[], RiverExecutor | None]
    traced: RiverProgram | None = None


class Programs:
    """The programs of one accelerated model.

    Args:
        config: what the model is compiled with.
        build: builds a program.
        stores: whether programs are left for other processes, and taken from them.

    Attributes:
        config: the same, but for where twins come from.
    """

    def __init__(self, config: RiverConfig, build: Build, stores: bool) -> None:
        self.config = replace(config, artifact=None, on_missing_artifact="raise")
        self._build, self._stores = build, stores
        self._usable = config.offload is None
        self._identity: str | None = None
        self._known: dict[str, list[_Known]] = {}
        self._new: list[tuple[str, Program]] = []
        self._lock = threading.Lock()  # (threads may generate with one model)
        self._about = ""

    def begin(self, model: PreTrainedModel, identity: str) -> bool:
        """Begins a call; returns whether programs can be recalled and kept for the model.

        Args:
            model: the model.
            identity: its own now, as `config` compiles it.
        """
        if not (self._usable and model.device.type == "cpu"):
            return False
        with self._lock:
            if identity != self._identity:
                size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                self._about = f"programs of {type(model).__name__}, {size:.0f}M parameters"
                self._identity, self._known, self._new = identity, {}, []
        return True

    def recall(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        """Returns a pass for inputs of a model's forward; None if none is stored."""
        assert self._identity is not None, "begin() found an identity"
        with self._lock:
            try:
                return self._find(model, inputs, cache) or self._follow(model, inputs, cache)
            except CannotBuild as why:  # (the backend says so)
                log.info("known passes are left out: %s", why)
                return None

    def _find(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        entry, signature = self._entry(), _signature(inputs, cache)
        if signature not in self._known:
            read = [] if entry is None else _read(entry, signature)
            self._known[signature] = [_Known(program, lambda: None) for program in read]
        for known in self._known[signature]:
            args = arguments(known.program, model, inputs, cache)
            if args is None:
                continue
            executor = known.executor()
            if executor is None:
                executor = self._build(known.program, _names(known.program), args, "stored")
                known.executor = _always(executor)
                if entry is not None:
                    entry.used()
            return executor, args
        return None

    def _follow(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        """Returns a pass of one token that follows from one of several, None if none does."""
        if not _is_of_one_token(inputs) or not is_of_transformers(model):
            return None
        signature = _signature(inputs, cache)
        for known in self._known.get(_signature(inputs, cache, one_token=False), ()):
            one = None if known.traced is None else of_one_token(known.program, known.traced)
            if one is None:
                continue
            args = arguments(replace(known.program, inputs=one.inputs, conditions=one.conditions), model, inputs, cache)
            if args is None:
                continue
            executor = self._build(one.found, [given.name for given in one.inputs], args, "derived")
            executor.locate(one.locate(executor.program))
            self._add(signature, _Known(executor.program, _always(executor)))
            return executor, args
        return None

    def _add(self, signature: str, known: _Known) -> None:
        self._known.setdefault(signature, []).append(known)
        self._new.append((signature, known.program))

    def _entry(self, about: str = "") -> Entry | None:
        """Returns the model's folder in the store, None where nothing is stored."""
        assert self._identity is not None, "begin() found an identity"
        return Entry(self._identity, about) if self._stores and enabled() else None

    def keep(self, inputs: Mapping[str, Any], cache: Cache, executor: RiverExecutor, traced: RiverProgram) -> None:
        """Keeps a pass that Dynamo traced in this call, of a located program."""
        signature = _signature(inputs, cache)
        if any(known.executor() is executor for known in self._known.get(signature, ())):
            return  # (one graph may serve several widths)
        with self._lock:
            self._add(signature, _Known(executor.program, weakref.ref(executor), traced))  # (Dynamo may drop it)

    def write(self) -> None:
        """Writes, at the end of a call, what is to be stored."""
        with self._lock:
            new, self._new = self._new, []
        entry = None if self._identity is None else self._entry(self._about)
        if entry is None:
            return
        for signature, program in new:
            try:
                content = dumps(program)
            except NotStorable as why:
                log.info("a pass is not stored: %s", why)
                continue
            entry.write(f"{signature}-{hashlib.sha256(content).hexdigest()[:16]}{_ENDING}", content)
        if new:
            keep_bound()


def _always(executor: RiverExecutor) -> Callable[[], RiverExecutor]:
    return lambda: executor


def _names(program: Program) -> list[str]:
    return [given.name for given in program.inputs]


def _read(entry: Entry, signature: str) -> list[Program]:
    found = []
    for name in entry.names(_ENDING):
        content = entry.read(name) if name.startswith(signature) else None
        if content is None:
            continue
        try:
            found.append(loads(content))
        except NotStorable as why:
            entry.damaged(name, why)
    return found


def _is_of_one_token(inputs: Mapping[str, Any]) -> bool:
    return bool(inputs["input_ids"].shape[1] == 1)


def _signature(inputs: Mapping[str, Any], cache: Cache, one_token: bool | None = None) -> str:
    """Returns the signature of passes with inputs like these; `one_token` says otherwise than they do."""
    one_token = _is_of_one_token(inputs) if one_token is None else one_token

    def of(value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, value.dim()
        return type(value).__qualname__ if isinstance(value, Cache) else value

    arguments = sorted((str(name), str(of(value))) for name, value in named(inputs))
    layers = [type(layer).__qualname__ for layer in cache.layers]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return hashlib.sha256(repr((one_token, arguments, layers, modes)).encode()).hexdigest()[:24]
