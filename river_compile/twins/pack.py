"""The packed weights of a model, found in memory or in a file by the digest of their parameters, or made.

If parameters change, a program is built again: unchanged weights are found, and the others replace the earlier ones.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from river_compile.compile_cache.folder import Entry, is_enabled
from river_compile.errors import TwinsError
from river_compile.passes.program import Matmul
from river_compile.twins.backbone_file import write_backbone_file
from river_compile.twins.background import Background
from river_compile.twins.digests import Digests
from river_compile.twins.exit_tuning import TunedExits
from river_compile.twins.file import (
    TwinFile,
    entry_for,
    open_stored,
    remove_damaged,
    write_missing,
    write_stored,
)
from river_compile.twins.joint_loss import JointLoss
from river_compile.twins.making import Job
from river_compile.twins.threads import in_threads
from river_compile.twins.weights import ProgramWeights, TwinWeight, weak_refs

_SMALL = 20_000_000  # weights that are packed in a second or two, so immediately


class TwinWeights:
    """All packed weights of one model. Thread-safe."""

    def __init__(self) -> None:
        self._made_before: dict[tuple[object, ...], TwinWeight] = {}  # the latest by matmul and options
        self._programs: weakref.WeakSet[ProgramWeights] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._opened: TwinFile | None = None
        self.stores = True  # whether the compile cache is read and written
        self.digests = Digests()
        self.background = Background()
        self.loss = JointLoss()
        self.exits = TunedExits()
        self.seconds = 0.0  # that programs took to get their weights, apart from the background's
        self.changes = 0  # times that parameters were found changed
        self.changed = 0  # twins that were quantized again the last time

    def find(self, matmuls: Sequence[Matmul], job: Job) -> ProgramWeights:
        """Return the packed weights of matmuls: from memory, from a file, or made. Raises a TwinsError or OptionError.

        Args:
            matmuls: of twins, and lossless ones of the backbone.
            job: how missing ones are made. Twins that tokens can wait for may be left to the background.
        """
        with self._lock:
            may_wait = job.can_wait and self.background.enabled and not job.refresh
            if not may_wait:
                self.background.end(cancel=job.refresh)
            usable = self.background.usable  # before the look at what it has made
            there = self._in_memory(matmuls, job)
            if may_wait and (faster := job.quick) is not None:
                there = self._in_memory(matmuls, faster) | there
            missing = [matmul for matmul in matmuls if matmul not in there]
            in_place = [matmul for matmul in missing if matmul.in_place]
            new = self._made(job, in_place, lossless=True) if in_place else {}
            for lossless in (True, False):
                some = [matmul for matmul in missing if matmul.lossless == lossless and not matmul.in_place]
                if some:
                    new |= self._loaded_or_made(job, some, lossless, may_wait and not lossless)
            self._made_before |= {job.key(matmul): made for matmul, made in new.items()}
            found = there | new
            packed = {matmul: found[matmul] for matmul in matmuls if matmul in found}
            awaits = self.background.packing if len(packed) < len(matmuls) else None
            if job.config.budget is not None and awaits is None:
                self._tune_exits(job, [matmul for matmul in matmuls if not matmul.lossless])
            if not all(matmul.lossless for matmul in matmuls):
                self.background.begin_writing()
            program = ProgramWeights(packed, job.parameters, self.digests.of, [*new.values()], awaits, awaits is usable)
            self._programs.add(program)
            return program

    def with_file(self, job: Job, savable: Sequence[Matmul], names: Iterable[str]) -> Job:
        """Return a job that reads the file of the options, which is written first if they say so. Raises a TwinsError.

        Args:
            job: one whose options name a folder.
            savable: the matmuls of the twins that a missing file gets.
            names: of all matmuls that the model can have.
        """
        with self._lock:
            folder = Path(job.config.twins or "")
            if job.config.on_missing_twins == "save":
                write_missing(folder, lambda: [*self._made(job, savable, lossless=False).values()])
            if self._opened is None or self._opened.folder != folder:
                self._opened = TwinFile(folder)
            self._opened.check_names(names)
            return replace(job, file=self._opened)

    @property
    def packing_seconds(self) -> float:
        return self.seconds + self.background.seconds

    def has(self, *, lossless: bool) -> bool:
        """Whether packed weights of the backbone, or those of twins, are in memory."""
        return any(x.matmul.lossless == lossless and not x.matmul.in_place for x in self._made_before.values())

    def packs_later(self, lossless: Sequence[Matmul]) -> bool:
        """Whether the background writes the file of so many 12-bit weights, for later processes."""
        return self.background.enabled and self.stores and is_enabled() and sum(map(_size, lossless)) > _SMALL

    def write_later(self, matmuls: Sequence[Matmul], inputs: Sequence[Any], *, has_twins: bool) -> None:
        """Have the background write the file of 12-bit weights, once the twins are there if the model `has_twins`."""
        with self._lock:
            write = functools.partial(write_backbone_file, matmuls, inputs, self.digests)
            self.background.write(write, now=not has_twins or self.has(lossless=False))

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, parameters may move to other addresses with their values."""
        weights = {made for program in self._programs for made in program.packed.values()}
        there = [tensors for made in weights if len(tensors := made.parameters) == len(made.made_from)]
        known = [(tensors, self.digests.known(tensors)) for tensors in there]
        before = [(program, program.is_unchanged) for program in self._programs]
        yield
        for tensors, digest in known:
            if digest is not None:
                self.digests.note(tensors, digest)
        for program, same in before:
            program.accept_move(same)

    def compare_digests(self) -> int:
        """Compare all digests; return the number of changed weights, which the next sequence replaces."""
        made = {made for program in self._programs for made in program.packed.values()}
        for program in self._programs:
            program.forget_stamp()
        self.digests.forget()
        return sum(not same for same in in_threads(lambda weight: weight.is_current, made))

    def _in_memory(self, matmuls: Sequence[Matmul], job: Job) -> dict[Matmul, TwinWeight]:
        found = {}
        for matmul in matmuls:
            made = self._made_before.get(job.key(matmul))
            if made is not None and made.digest == job.digests[matmul]:
                made.made_from = weak_refs(job.parameters[matmul].tensors)
                found[matmul] = made
        return found

    def _loaded_or_made(
        self, job: Job, matmuls: Sequence[Matmul], lossless: bool, may_wait: bool
    ) -> dict[Matmul, TwinWeight]:
        """Load weights from the options' file or the compile cache, or make them; none if the background does."""
        if job.file is not None and not lossless:
            return job.load(matmuls, job.file)
        if not self._has_entry(job, lossless):
            return self._begun_or_made(job, matmuls, lossless, may_wait, None)
        entry = entry_for(matmuls, job.digests, job.quantizer(lossless))
        if not lossless:
            self.loss.entry = entry
        file = open_stored(entry)
        if file is None:
            return self._begun_or_made(job, matmuls, lossless, may_wait, entry)
        there = [matmul for matmul in matmuls if not lossless or matmul.name in file.names]
        others = [matmul for matmul in matmuls if matmul not in there]  # that a backbone's file omits
        try:
            loaded = job.load(there, file)
        except TwinsError as error:  # the file is whole and of other weights
            remove_damaged(entry, error)
            return self._begun_or_made(job, matmuls, lossless, may_wait, entry)
        if not lossless:
            self.loss.read(job.observes)
        return loaded | (self._made(job, others, lossless) if others else {})

    def _has_entry(self, job: Job, lossless: bool) -> bool:
        """Whether the compile cache may have weights of a job."""
        own = job.statistics.observed is not None and not lossless
        return not (own or job.refresh) and self.stores and is_enabled()

    def _tune_exits(self, job: Job, twins: Sequence[Matmul], now: bool = False) -> None:
        """Find the exit rule of twins that are there: known, stored with them, or tuned."""
        budget = job.config.budget
        assert budget is not None
        entry = entry_for(twins, job.digests, job.quantizer(lossless=False))
        stored = entry if job.file is None and self._has_entry(job, lossless=False) else None
        if self.exits.find(entry.folder.name, budget, stored):
            return
        made = [self._made_before[job.key(matmul)] for matmul in twins if matmul in job.blocks]
        tune = functools.partial(self.exits.tune, made, budget, job.statistics.own, stored)
        if now or not self.background.enabled or sum(map(_size, twins)) <= _SMALL:
            tune()
        else:
            self.background.begin([tune], stored is not None)

    def _begun_or_made(
        self, job: Job, matmuls: Sequence[Matmul], lossless: bool, may_wait: bool, entry: Entry | None
    ) -> dict[Matmul, TwinWeight]:
        """Make weights and write them to an entry, immediately or in the background, which returns none."""
        if not may_wait or sum(map(_size, matmuls)) <= _SMALL:
            made = self._made(job, matmuls, lossless)
            if entry is not None:
                write_stored(entry, [*made.values()])
            return made
        # If others are being made, the program is built again when those are there, and these begin.
        works = [functools.partial(self._make_later, job, matmuls, entry)]
        if (faster := job.quick) is not None:
            works.insert(0, functools.partial(self._make_later, faster, matmuls, None))
        self.background.begin(works, entry is not None)
        return {}

    def _make_later(self, job: Job, matmuls: Sequence[Matmul], entry: Entry | None) -> None:
        """Make twins, unless their parameters change meanwhile, which the next sequence finds."""
        self.loss.is_old |= job.observes
        faster = job.quick
        quick = {} if faster is None else self._in_memory(matmuls, faster)

        def keep(twin: TwinWeight) -> TwinWeight:
            return quick[twin.matmul].become(twin) if twin.matmul in quick else twin

        made = job.make_unless_changed(matmuls, False, keep)
        if made and entry is not None:
            write_stored(entry, [*made.values()])
        self._made_before |= {job.key(matmul): twin for matmul, twin in made.items()}
        if faster is not None:
            for matmul in quick:
                self._made_before.pop(faster.key(matmul), None)
        if job.config.budget is not None and made:
            self._tune_exits(job, job.twins, now=True)

    def _made(self, job: Job, matmuls: Sequence[Matmul], lossless: bool) -> dict[Matmul, TwinWeight]:
        self.loss.is_old |= job.observes and not lossless
        return job.make(matmuls, lossless)


def _size(matmul: Matmul) -> int:
    return math.prod(matmul.shape)
