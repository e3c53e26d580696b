"""The programs of one accelerated model that are known: built in this process, or read from the compile cache.

Not handled: how a program comes to be (`program_for.py`). GPUs, weights that move, and models without identity, whose
programs Dynamo's guards find in every process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from river_compile.collector import collector_paused
from river_compile.compile_cache.codec import NotCacheable, dumps, loads
from river_compile.compile_cache.folder import Entry, evict, is_enabled
from river_compile.config import RiverConfig
from river_compile.passes.program import Program, RiverProgram
from river_compile.passes.stamp import Template
from river_compile.runtime.executor import RiverExecutor

log = logging.getLogger("river_compile.compile_cache")
_ENDING = ".pass"


@dataclass(eq=False)
class KnownProgram:
    """A program whose inputs have sources."""

    program: Program
    executor: RiverExecutor | None  # None: it was read, and is not built yet
    traced: RiverProgram | None = None  # before its passes; None if an earlier process traced it
    template: Template | None = None  # that it was stamped from


class ProgramCache:
    """The programs of one model, compiled with `config`; `on_disk`: shared with other processes."""

    def __init__(self, config: RiverConfig, on_disk: bool) -> None:
        self.options = config  # that programs are built with
        self.config = replace(config, twins=None, on_missing_twins="raise")  # programs do not depend on these
        self.lock = threading.RLock()  # threads may generate with one model
        self.not_stamped: set[str] = set()  # signatures of passes that a few layers cannot stand for
        self._on_disk = on_disk
        self._identity: str | None = None
        self._known: dict[str, list[KnownProgram]] = {}  # by signature
        self._new: list[tuple[str, Callable[[], Program]]] = []  # to be made and written
        self._about = ""

    def begin(self, model: PreTrainedModel, identity: str) -> bool:
        """Begin a call of a model with its present identity; False if its programs cannot be known."""
        if self.config.moves_weights or model.device.type != "cpu":
            return False
        with self.lock:
            if identity != self._identity:
                size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                self._about = f"programs of {type(model).__name__}, {size:.0f}M parameters"
                self._identity, self._known, self._new, self.not_stamped = identity, {}, [], set()
        return True

    def of(self, signature: str) -> list[KnownProgram]:
        """Return the programs of calls with a signature; reads them if this process has none."""
        if signature not in self._known:
            entry = self._entry()
            with collector_paused():
                read = () if entry is None else _read_programs(entry, signature)
                self._known[signature] = [KnownProgram(program, None) for program in read]
        return self._known[signature]

    def add(
        self, signature: str, executor: RiverExecutor, traced: RiverProgram, template: Template | None = None
    ) -> None:
        """Add a program that was built in this process; one that is known already stays."""
        with self.lock:
            known = self._known.setdefault(signature, [])
            if any(other.executor is executor for other in known):  # one graph may serve several widths
                return
            known.append(KnownProgram(executor.program, executor, traced, template))
            self._new.append((signature, functools.partial(_for_later, executor.program, executor.for_later)))

    def forget(self, signature: str, known: KnownProgram) -> None:
        """Leave a program that was read to later processes."""
        self._known[signature].remove(known)

    def touch(self) -> None:
        """Note that a program which was read is used, so that the cache keeps it."""
        entry = self._entry()
        if entry is not None:
            entry.touch()

    def write(self) -> None:
        """Write new programs to the compile cache, at the end of a call."""
        with self.lock:
            new, self._new = self._new, []
        entry = None if self._identity is None else self._entry(self._about)
        if entry is None:
            return
        for signature, make in new:
            try:
                content = dumps(make())
            except NotCacheable as why:
                log.info("a program is not cached: %s", why)
                continue
            entry.write(f"{signature}-{hashlib.sha256(content).hexdigest()[:16]}{_ENDING}", content)
        if new:
            evict()

    def _entry(self, about: str = "") -> Entry | None:
        """Return the model's entry of the compile cache, None if the cache is off."""
        assert self._identity is not None, "begin() found an identity"
        return Entry(self._identity, about) if self._on_disk and is_enabled() else None


def _for_later(program: Program, make: Callable[[], Program] | None) -> Program:
    """Return the program that later processes run in place of one with located inputs."""
    return program if make is None else replace(make(), inputs=program.inputs, conditions=program.conditions)


def _read_programs(entry: Entry, signature: str) -> Iterator[Program]:
    for name in entry.names(_ENDING):
        content = entry.read(name) if name.startswith(signature) else None
        if content is None:
            continue
        try:
            yield loads(content)
        except NotCacheable as why:
            entry.remove_damaged(name, why)
