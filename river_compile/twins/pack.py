"""The packed weights of a model: found by what they are made from, in memory or on disk, or made.

A weight is found by the digest of its parameters and how it is asked for. Where parameters change, a program is built
anew: what stayed as it was is found again, and the others take the place of those before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from river_compile.compile_cache.folder import Entry, is_enabled
from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.kernels.quant.grid import threads_for
from river_compile.passes.program import Matmul
from river_compile.progress import stage_reached
from river_compile.runtime.tensor_parallel import ALONE, Ranks
from river_compile.twins.calibration_stats import Moments, Observation
from river_compile.twins.file import FILE, TwinFile, open_stored, stored, write_missing, write_stored
from river_compile.twins.quantize import make, packed
from river_compile.twins.self_calibration import SelfCalibration
from river_compile.twins.twin_kl import TwinLoss
from river_compile.twins.weights import (
    LOSSLESS,
    Parameters,
    ParameterStamp,
    ProgramWeights,
    TwinWeight,
    digest_of,
    held,
)

T = TypeVar("T")
R = TypeVar("R")
# Has the model read matrices (those given), calls back with the moments of each, and returns what was read.
Read = Callable[[Sequence[Tensor], Callable[[Tensor, Moments], None]], str]
_TOGETHER = 4  # matmuls for each thread: those of a block or two, so that no thread waits long
_REMEMBERED = 8  # times as many digests as a program has matmuls
_LOSS = "loss.json"


@dataclass(frozen=True)
class Statistics:
    """The quantizers' statistics of a model's matrices: observed, else from text of its own.

    `ranks` share the model: they take statistics together or not at all.
    """

    observed: Observation | None = None
    own: SelfCalibration = field(default_factory=SelfCalibration)
    ranks: Ranks = ALONE

    @property
    def number(self) -> int:
        """A number of the observation, whether it is still there or not."""
        return 0 if self.observed is None else self.observed.number

    def take(self, *, anew: bool = False) -> tuple[Observation | None, Read | None]:
        """Returns what is known before a matrix is packed, and what has the model read text of its own meanwhile.

        There is one of the two at most. Ranks run the model together, and may pack different matrices, so there the
        text is read before. `anew`: of weights that changed.
        """
        if self.observed is not None and self.observed.moments:
            return self.observed, None
        if self.ranks.several:
            return self.own.observation(anew=anew), None
        return None, functools.partial(self.own.visit, anew=anew)


class TwinWeights:
    """All packed weights of one model.

    Attributes:
        stores: whether they are left for other processes, and taken from them.
        seconds: the time that making them took.
        loss: what the latest twins lose together, None where that is not known.
        changes: how often parameters were found changed.
        changed: the number of twins' weights that were packed again the last time.
    """

    def __init__(self) -> None:
        self._made_before: dict[tuple[object, ...], TwinWeight] = {}  # the latest by matmul, and how it is asked for
        self._digests: dict[tuple[int, ...], tuple[ParameterStamp, str]] = {}  # by the parameters' addresses as objects
        self._programs: weakref.WeakSet[ProgramWeights] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._opened: TwinFile | None = None
        self._stored: Entry | None = None  # of the latest twins
        self._not_judged = False
        self.stores = True
        self.seconds = 0.0
        self.loss: TwinLoss | None = None
        self.changes = self.changed = 0

    def get(
        self,
        matmuls: Sequence[Matmul],
        inputs: Sequence[Any],
        config: RiverConfig,
        statistics: Statistics,
        device: torch.device,
        every: Iterable[str] = (),
        savable: Sequence[Matmul] = (),
        anew: bool = False,
    ) -> ProgramWeights:
        """Returns the packed weights of matmuls, making those that are missing.

        Args:
            matmuls: of twins, and of the backbone, whose weights are packed without loss.
            inputs: of the graph, real tensors.
            config: its `quantizer`, `artifact` and `on_missing_artifact` say how.
            statistics: for "awq" and "gptq".
            device: where the packed weights are to lie.
            every: names of all matmuls that the model can have; an artifact may hold no other.
            savable: what an artifact that is missing is to hold.
            anew: parameters have changed: no file has their weights, and text of the model's own is another.

        Raises:
            ArtifactError: (a ``ValueError``) the artifact is damaged or not this model's; nothing of it is used.
            OptionError: (a ``ValueError``) a matrix was read by nothing that was observed.
        """
        with self._lock:
            start = time.perf_counter()
            parameters = {matmul: Parameters.of(matmul, inputs) for matmul in (*matmuls, *savable)}
            job = _Job(config, statistics, device, parameters, self._digests_of(parameters), anew)
            if config.artifact is not None and not anew:
                job.file = self._file_of(job, savable)
                job.file.check_names(every)
            keys = {matmul: job.key(matmul) for matmul in matmuls}
            there = {
                matmul: made
                for matmul, key in keys.items()
                if (made := self._made_before.get(key)) is not None and made.digest == job.digests[matmul]
            }
            for matmul, made in there.items():
                made.made_from = held(parameters[matmul].tensors)
            found, ranks = dict(there), statistics.ranks
            # (Ranks take statistics together, if one of them misses a weight that the others have.)
            if ranks.several and job.observes and not ranks.every(all(x in there or x.lossless for x in matmuls)):
                job.statistics = replace(statistics, observed=statistics.take(anew=anew)[0])
            for lossless in (True, False):
                some = [x for x in matmuls if x not in found and x.lossless == lossless]
                if some:
                    found |= self._loaded_or_made(job, some, lossless)
            for matmul in matmuls:
                self._made_before[keys[matmul]] = found[matmul]
            made_now = [found[matmul] for matmul in matmuls if matmul not in there]
            program = ProgramWeights({x: found[x] for x in matmuls}, inputs, self._digests_of, made_now)
            self._programs.add(program)
            self.seconds += time.perf_counter() - start
            return program

    def judge(self, twins: Iterable[TwinWeight], statistics: Statistics) -> None:
        """Estimates the joint loss of a graph's twins, if some were made with statistics since the last time."""
        if not statistics.ranks.every(not self._not_judged):
            self.loss, self._not_judged = statistics.own.loss(twins), False
            if self._stored is not None and self.loss is not None and self._stored.folder.exists():
                self._stored.write(_LOSS, json.dumps(asdict(self.loss)).encode())

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, parameters may move to other addresses, with the values that they have."""
        weights = {made for program in self._programs for made in program.packed.values()}
        there = [tensors for made in weights if len(tensors := made.parameters) == len(made.made_from)]
        known = [(tensors, self._known(tensors)) for tensors in there]
        before = [(program, program.look_the_same) for program in self._programs]
        yield
        for tensors, digest in known:
            if digest is not None:
                self._digests[tuple(map(id, tensors))] = ParameterStamp(tensors), digest
        for program, same in before:
            program.moved(same)

    def look_again(self) -> int:
        """Has all digests compared before the next sequence; returns how many weights are not those they were.

        It reads all parameters.
        """
        made = {made for program in self._programs for made in program.packed.values()}
        for program in self._programs:
            program.look_again()
        self._digests.clear()
        return sum(not same for same in _in_threads(lambda weight: weight.is_current, made))

    def _digests_of(self, parameters: dict[Matmul, Parameters]) -> dict[Matmul, str]:
        """Returns the digests of matmuls' parameters; those that look as they did are not read again."""

        def digest(given: Parameters) -> str:
            known = self._known(given.tensors)
            if known is None:
                known = digest_of(given.tensors)
                self._digests[tuple(map(id, given.tensors))] = ParameterStamp(given.tensors), known
            return known

        if len(self._digests) > _REMEMBERED * len(parameters):  # (of parameters that are gone)
            self._digests.clear()
        # (What a twin and the backbone make of the same parameters is hashed once.)
        distinct = {tuple(map(id, given.tensors)): given for given in parameters.values()}
        found = dict(zip(distinct, _in_threads(digest, distinct.values()), strict=True))
        return {matmul: found[tuple(map(id, given.tensors))] for matmul, given in parameters.items()}

    def _known(self, tensors: Sequence[Tensor]) -> str | None:
        """Returns the digest of tensors, None where they do not look as they did when it was taken."""
        stamp, digest = self._digests.get(tuple(map(id, tensors)), (None, ""))
        return digest if stamp is not None and stamp == ParameterStamp(tensors) else None

    def _file_of(self, job: _Job, savable: Sequence[Matmul]) -> TwinFile:
        """Returns the file that the options name, made where it is missing and the options say so."""
        ranks = job.statistics.ranks
        folder = ranks.folder(Path(job.config.artifact or ""))
        if job.config.on_missing_artifact == "save":
            # Ranks run the model together, which a rank must not do while others wait for the file's lock.
            if ranks.several and savable and job.observes and not ranks.every((folder / FILE).exists()):
                job.statistics = replace(job.statistics, observed=job.statistics.take()[0])
            write_missing(folder, lambda: [*self._made(job, savable, lossless=False).values()])
        if self._opened is None or self._opened.folder != folder:
            self._opened = TwinFile(folder)
        return self._opened

    def _loaded_or_made(self, job: _Job, matmuls: Sequence[Matmul], lossless: bool) -> dict[Matmul, TwinWeight]:
        """Takes weights from the options' file or from what an earlier process left in the store, or makes them."""
        if job.file is not None and not lossless:
            return self._loaded(job, matmuls, job.file, str(job.file.folder))
        own = job.statistics.observed is not None and not lossless
        if own or job.anew or not self.stores or job.statistics.ranks.several or not is_enabled():
            return self._made(job, matmuls, lossless)
        entry = stored(matmuls, job.digests, job.quantizer(lossless))
        if not lossless:
            self._stored = entry
        file = open_stored(entry)
        if file is None:
            made = self._made(job, matmuls, lossless)
            write_stored(entry, [*made.values()])
            return made
        if not lossless:
            known = entry.read(_LOSS)
            self.loss = None if known is None else TwinLoss(**json.loads(known))
            self._not_judged = job.observes and self.loss is None
        there = [matmul for matmul in matmuls if not lossless or matmul.name in file.names]
        others = [matmul for matmul in matmuls if matmul not in there]  # (which a backbone's file leaves out)
        return self._loaded(job, there, file, str(file.folder)) | (self._made(job, others, lossless) if others else {})

    def _loaded(self, job: _Job, matmuls: Sequence[Matmul], file: TwinFile, artifact: str) -> dict[Matmul, TwinWeight]:
        """Takes weights from a file; all are looked up before the first is packed: a file fits as a whole or not."""
        asked = {matmul: job.quantizer(matmul.lossless) for matmul in matmuls}
        saved = {matmul: file.find(matmul, asked[matmul], job.digests[matmul]) for matmul in matmuls}

        def load(matmul: Matmul) -> TwinWeight:
            grid, facts = saved[matmul]
            made = packed(matmul, job.parameters[matmul], job.digests[matmul], asked[matmul], grid, facts, job.device)
            return replace(made, artifact=artifact)

        return dict(zip(matmuls, _in_threads(load, matmuls), strict=True))

    def _made(self, job: _Job, matmuls: Sequence[Matmul], lossless: bool) -> dict[Matmul, TwinWeight]:
        """Makes weights in threads, in the order in which the model reads them where it is to."""
        recorded, read = None, None
        if job.observes and not lossless:
            recorded, read = job.statistics.take(anew=job.anew)
            self._not_judged = True
        known = {matmul: _moments(recorded, matmul, job.parameters[matmul]) for matmul in matmuls}
        found: dict[Matmul, TwinWeight] = {}
        weights = [job.parameters[matmul].weights[0] for matmul in matmuls]
        threads = threads_for(weights[0])
        with ThreadPoolExecutor(threads) as pool:

            def one(given: tuple[Matmul, Moments | None]) -> TwinWeight:
                matmul, moments = given
                asked = job.quantizer(lossless)
                return make(matmul, job.parameters[matmul], job.digests[matmul], asked, moments, job.device)

            def work(jobs: Sequence[tuple[Matmul, Moments | None]]) -> None:
                for (matmul, _), twin in zip(jobs, pool.map(one, jobs), strict=True):
                    found[matmul] = twin
                    stage_reached(len(found) / len(matmuls))

            source = "" if recorded is None else recorded.source
            if read is not None:
                source = _while_read(read, matmuls, weights, work, _TOGETHER * threads)
            work([(matmul, known[matmul]) for matmul in matmuls if matmul not in found])
        for twin in found.values():
            if twin.output_sqnr is not None:
                twin.statistics = source
        return found


@dataclass
class _Job:
    """What one call of `get` goes by."""

    config: RiverConfig
    statistics: Statistics
    device: torch.device
    parameters: dict[Matmul, Parameters]
    digests: dict[Matmul, str]
    anew: bool
    file: TwinFile | None = None

    @property
    def observes(self) -> bool:
        """Whether weights are made with statistics."""
        return self.file is None and self.config.quantizer in OBSERVING

    def quantizer(self, lossless: bool) -> str:
        return LOSSLESS if lossless else self.config.quantizer

    def key(self, matmul: Matmul) -> tuple[object, ...]:
        """Returns what a weight is found by, beside its digest."""
        number = self.statistics.number if self.observes and not matmul.lossless else 0
        origin = "" if self.file is None or matmul.lossless else str(self.file.folder)
        how = self.quantizer(matmul.lossless), matmul.layout, matmul.group_size, matmul.scales_inputs
        return matmul.name, self.device, *how, origin, number


def _moments(recorded: Observation | None, matmul: Matmul, parameters: Parameters) -> Moments | None:
    """Returns the recorded moments of a matmul's inputs, None where nothing was recorded."""
    moments = None if recorded is None else recorded.moments_of(parameters.weights[0])
    if recorded is not None and moments is None and not recorded.own:
        raise OptionError(
            f"a calibrated quantizer needs to know what the model's matrices read, and no observed text reached "
            f"{matmul.name}; call river_compile.observe(model, tokenizer, texts) with other texts before the first "
            "generation, name an artifact=, or use quantizer='hqq'"
        )
    return moments


def _while_read(
    read: Read,
    matmuls: Sequence[Matmul],
    weights: Sequence[Tensor],
    work: Callable[[Sequence[tuple[Matmul, Moments | None]]], None],
    together: int,
) -> str:
    """Has the model read matrices, and works on some at a time in the middle of that, so that few moments are held."""
    of_weight = defaultdict[int, list[Matmul]](list)  # by the matrix that stands for all of a matmul
    for matmul, weight in zip(matmuls, weights, strict=True):
        of_weight[id(weight)].append(matmul)
    waiting: list[tuple[Matmul, Moments | None]] = []
    failed: list[Exception] = []

    def see(weight: Tensor, moments: Moments) -> None:
        waiting.extend((matmul, moments) for matmul in of_weight[id(weight)])
        if len(waiting) >= together and not failed:
            try:
                work([*waiting])
            except Exception as error:  # (which is not the model's)
                failed.append(error)
            waiting.clear()

    source = read(weights, see)
    if failed:
        raise failed[0]
    work(waiting)
    return source


def _in_threads(function: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return [*pool.map(function, jobs)]
