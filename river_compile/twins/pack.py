"""The packed weights of a model, found in memory or in a file by the digest of their parameters, or made.

If parameters change, a program is built again: unchanged weights are found, and the others replace the earlier ones.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from river_compile.compile_cache.folder import Entry, is_enabled, warn_not_writable
from river_compile.config import RiverConfig
from river_compile.errors import TwinsError
from river_compile.passes.program import Matmul
from river_compile.twins.background import Background
from river_compile.twins.file import (
    TwinFile,
    entry_for,
    is_stored,
    open_stored,
    remove_damaged,
    write_missing,
    write_stored,
)
from river_compile.twins.making import Job, Statistics, spilled
from river_compile.twins.own_text import TwinLoss
from river_compile.twins.quantize import pack_weight
from river_compile.twins.weights import (
    LOSSLESS,
    Parameters,
    ParameterStamp,
    ProgramWeights,
    TwinWeight,
    digest_of,
    weak_refs,
)

T = TypeVar("T")
R = TypeVar("R")
_REMEMBERED = 8  # digests kept per matmul of a program
_LOSS = "loss.json"
_SMALL = 20_000_000  # weights that are packed in a second or two, so immediately


class TwinWeights:
    """All packed weights of one model. Thread-safe."""

    def __init__(self) -> None:
        self._made_before: dict[tuple[object, ...], TwinWeight] = {}  # the latest by matmul and options
        self._digests: dict[tuple[int, ...], tuple[ParameterStamp, str]] = {}  # by the parameters' ids
        self._programs: weakref.WeakSet[ProgramWeights] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._opened: TwinFile | None = None
        self._stored: Entry | None = None  # of the latest twins
        self._loss_is_old = False
        self.stores = True  # whether the compile cache is read and written
        self.background = Background()
        self.seconds = 0.0  # of making weights, apart from `packing`
        self.loss: TwinLoss | None = None  # joint loss of the latest twins, None if not known
        self.changes = 0  # times that parameters were found changed
        self.changed = 0  # twins that were quantized again the last time

    def get(
        self,
        matmuls: Sequence[Matmul],  # of twins, and lossless ones of the backbone
        inputs: Sequence[Any],  # of the graph, real tensors
        config: RiverConfig,
        statistics: Statistics,
        device: torch.device,  # of the packed weights
        every: Iterable[str] = (),  # names of all matmuls that the model can have
        savable: Sequence[Matmul] = (),  # contents of saved twins that are to be written
        refresh: bool = False,  # parameters have changed: no file has their weights, and own text is sampled again
        drafting: bool = False,  # only drafts read the twins, so a result without them will do
    ) -> ProgramWeights:
        """Return the packed weights of matmuls; make missing ones. Raises a TwinsError or OptionError."""
        with self._lock:
            start = time.perf_counter()
            may_wait = drafting and self.background.enabled and not refresh
            if not may_wait:
                self.background.end(cancel=refresh)
            parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in (*matmuls, *savable)}
            job = Job(config, statistics, device, parameters, self._digests_of(parameters), refresh)
            twins = [matmul for matmul in (*matmuls, *savable) if not matmul.lossless]
            if config.twins is not None and twins and not refresh:  # a prompt's program may have none
                job.file = self._file_of(job, savable)
                job.file.check_names(every)
            keys = {matmul: job.key(matmul) for matmul in matmuls}
            there = {
                matmul: made
                for matmul, key in keys.items()
                if (made := self._made_before.get(key)) is not None and made.digest == job.digests[matmul]
            }
            for matmul, made in there.items():
                made.made_from = weak_refs(parameters[matmul].tensors)
            found = dict(there)
            for lossless in (True, False):
                some = [x for x in matmuls if x not in found and x.lossless == lossless]
                if some:
                    found |= self._loaded_or_made(job, some, lossless, may_wait and not lossless)
            packed = {x: found[x] for x in matmuls if x in found}
            self._made_before |= {keys[matmul]: made for matmul, made in packed.items()}
            made_now = [made for matmul, made in packed.items() if matmul not in there]
            awaits = self.background.packing if len(packed) < len(matmuls) else None
            if not all(matmul.lossless for matmul in matmuls):
                self.background.begin_writing()
            program = ProgramWeights(packed, inputs, self._digests_of, made_now, awaits)
            self._programs.add(program)
            self.seconds += time.perf_counter() - start
            return program

    @property
    def packing_seconds(self) -> float:
        return self.seconds + self.background.seconds

    def estimate_loss(self, twins: Iterable[TwinWeight], statistics: Statistics) -> None:
        """Estimate the joint loss of a graph's twins, if statistics made some since the last time."""
        if self._loss_is_old:
            self.loss, self._loss_is_old = statistics.own.loss(twins), False
            if self._stored is not None and self.loss is not None and self._stored.folder.exists():
                self._stored.write(_LOSS, json.dumps(asdict(self.loss)).encode())

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, parameters may move to other addresses with their values."""
        weights = {made for program in self._programs for made in program.packed.values()}
        there = [tensors for made in weights if len(tensors := made.parameters) == len(made.made_from)]
        known = [(tensors, self._known(tensors)) for tensors in there]
        before = [(program, program.is_unchanged) for program in self._programs]
        yield
        for tensors, digest in known:
            if digest is not None:
                self._digests[tuple(map(id, tensors))] = ParameterStamp(tensors), digest
        for program, same in before:
            program.accept_move(same)

    def compare_digests(self) -> int:
        """Compare all digests; return the number of changed weights, which the next sequence replaces."""
        made = {made for program in self._programs for made in program.packed.values()}
        for program in self._programs:
            program.forget_stamp()
        self._digests.clear()
        return sum(not same for same in _in_threads(lambda weight: weight.is_current, made))

    def _digests_of(self, parameters: dict[Matmul, Parameters]) -> dict[Matmul, str]:
        """Return the digests of matmuls' parameters; those with the known stamp are not read."""

        def digest(given: Parameters) -> str:
            known = self._known(given.tensors)
            if known is None:
                known = digest_of(given.tensors)
                self._digests[tuple(map(id, given.tensors))] = ParameterStamp(given.tensors), known
            return known

        if len(self._digests) > _REMEMBERED * len(parameters):  # most are of parameters that are gone
            self._digests.clear()
        # A twin and the backbone may share parameters: hash them once.
        distinct = {tuple(map(id, given.tensors)): given for given in parameters.values()}
        found = dict(zip(distinct, _in_threads(digest, distinct.values()), strict=True))
        return {matmul: found[tuple(map(id, given.tensors))] for matmul, given in parameters.items()}

    def _known(self, tensors: Sequence[Tensor]) -> str | None:
        """Return the digest of tensors, None if their stamp has changed."""
        stamp, digest = self._digests.get(tuple(map(id, tensors)), (None, ""))
        return digest if stamp is not None and stamp == ParameterStamp(tensors) else None

    def _file_of(self, job: Job, savable: Sequence[Matmul]) -> TwinFile:
        """Return the file that the options name; write it first if missing and the options say so."""
        folder = Path(job.config.twins or "")
        if job.config.on_missing_twins == "save":
            write_missing(folder, lambda: [*self._made(job, savable, lossless=False).values()])
        if self._opened is None or self._opened.folder != folder:
            self._opened = TwinFile(folder)
        return self._opened

    def _loaded_or_made(
        self, job: Job, matmuls: Sequence[Matmul], lossless: bool, may_wait: bool
    ) -> dict[Matmul, TwinWeight]:
        """Load weights from the options' file or the compile cache, or make them; none if the background does."""
        if job.file is not None and not lossless:
            return self._loaded(job, matmuls, job.file, str(job.file.folder))
        own = job.statistics.observed is not None and not lossless
        if own or job.refresh or not self.stores or not is_enabled():
            return self._begun_or_made(job, matmuls, lossless, may_wait, None)
        entry = entry_for(matmuls, job.digests, job.quantizer(lossless))
        if not lossless:
            self._stored = entry
        file = open_stored(entry)
        if file is None:
            return self._begun_or_made(job, matmuls, lossless, may_wait, entry)
        there = [matmul for matmul in matmuls if not lossless or matmul.name in file.names]
        others = [matmul for matmul in matmuls if matmul not in there]  # that a backbone's file omits
        try:
            loaded = self._loaded(job, there, file, str(file.folder))
        except TwinsError as error:  # the file is whole and of other weights
            remove_damaged(entry, error)
            return self._begun_or_made(job, matmuls, lossless, may_wait, entry)
        if not lossless:
            known = entry.read(_LOSS)
            self.loss = None if known is None else TwinLoss(**json.loads(known))
            self._loss_is_old = job.observes and self.loss is None
        return loaded | (self._made(job, others, lossless) if others else {})

    def _begun_or_made(
        self, job: Job, matmuls: Sequence[Matmul], lossless: bool, may_wait: bool, entry: Entry | None
    ) -> dict[Matmul, TwinWeight]:
        """Make weights and write them to an entry, immediately or in the background, which returns none."""
        may_wait = may_wait and sum(map(_size, matmuls)) > _SMALL
        if not may_wait:
            made = self._made(job, matmuls, lossless)
            if entry is not None:
                write_stored(entry, [*made.values()])
            return made
        # If others are being made, the program is built again when those are there, and these begin.
        self.background.begin(functools.partial(self._make_later, job, matmuls, entry), entry is not None)
        return {}

    def _make_later(self, job: Job, matmuls: Sequence[Matmul], entry: Entry | None) -> None:
        """Make twins, unless their parameters change meanwhile, which the next sequence finds."""
        self._loss_is_old |= job.observes
        made = job.make_unless_changed(matmuls, lossless=False)
        if made and entry is not None:
            write_stored(entry, [*made.values()])
        self._made_before |= {job.key(matmul): twin for matmul, twin in made.items()}

    def packs_later(self, lossless: Sequence[Matmul]) -> bool:
        """Whether the background writes the file of so many 12-bit weights, for later processes."""
        return self.background.enabled and self.stores and is_enabled() and sum(map(_size, lossless)) > _SMALL

    @property
    def has_lossless(self) -> bool:
        """Whether packed weights of the backbone are in memory."""
        return any(made.matmul.lossless for made in self._made_before.values())

    def write_later(self, matmuls: Sequence[Matmul], inputs: Sequence[Any]) -> None:
        """Have the background write the file of 12-bit weights, once the twins are there."""
        with self._lock:
            asked = any(not made.matmul.lossless for made in self._made_before.values())
            self.background.write(functools.partial(self.store_lossless, matmuls, inputs), asked)

    def has_stored(self, matmuls: Sequence[Matmul], inputs: Sequence[Any]) -> bool:
        """Whether the compile cache has the lossless weights of these matmuls."""
        return is_stored(self._lossless(matmuls, inputs)[0])

    def store_lossless(self, matmuls: Sequence[Matmul], inputs: Sequence[Any]) -> None:
        """Pack lossless weights for the compile cache, unless it has them."""
        entry, job = self._lossless(matmuls, inputs)
        if is_stored(entry):
            return
        try:
            entry.make_folder()
            # One after another is moved to a file: all of them are three quarters of the model.
            with tempfile.TemporaryDirectory(dir=entry.folder, prefix=".spilled.") as folder:
                keep = functools.partial(spilled, Path(folder))
                write_stored(entry, [*job.make_unless_changed(matmuls, lossless=True, keep=keep).values()])
        except OSError as error:
            warn_not_writable(error)

    def _lossless(self, matmuls: Sequence[Matmul], inputs: Sequence[Any]) -> tuple[Entry, Job]:
        """Return the entry of lossless weights, and the job that makes them."""
        parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in matmuls}
        with self._lock:
            digests = self._digests_of(parameters)
        job = Job(RiverConfig(), Statistics(), torch.device("cpu"), parameters, digests, refresh=False)
        return entry_for(matmuls, digests, LOSSLESS), job

    def _loaded(self, job: Job, matmuls: Sequence[Matmul], file: TwinFile, folder: str) -> dict[Matmul, TwinWeight]:
        """Load weights from a file. All are looked up before the first is packed: all or none fit."""
        asked = {matmul: job.quantizer(matmul.lossless) for matmul in matmuls}
        saved = {matmul: file.find(matmul, asked[matmul], job.digests[matmul]) for matmul in matmuls}

        def load(matmul: Matmul) -> TwinWeight:
            grid, facts = saved[matmul]
            made = pack_weight(
                matmul, job.parameters[matmul], job.digests[matmul], asked[matmul], grid, facts, job.device
            )
            return replace(made, folder=folder)

        return dict(zip(matmuls, _in_threads(load, matmuls), strict=True))

    def _made(self, job: Job, matmuls: Sequence[Matmul], lossless: bool) -> dict[Matmul, TwinWeight]:
        self._loss_is_old |= job.observes and not lossless
        return job.make(matmuls, lossless)


def _size(matmul: Matmul) -> int:
    return math.prod(matmul.shape)


def _in_threads(function: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return [*pool.map(function, jobs)]
