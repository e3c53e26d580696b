"""Makes packed weights: in threads, from observed statistics, or while the model reads its own text; or loads them.

Not handled: which weights are made, and when (:mod:`river_compile.twins.pack`).
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.kernels.quant.grid import threads_for
from river_compile.passes.program import Matmul
from river_compile.progress import stage_reached
from river_compile.system import trim_heap
from river_compile.twins.file import TwinFile
from river_compile.twins.observe import Moments, Observation
from river_compile.twins.own_text import SelfCalibration
from river_compile.twins.quantize import QUICK, UNOBSERVED, make_weight, pack_weight
from river_compile.twins.threads import in_threads, thread_pool
from river_compile.twins.weights import LOSSLESS, Parameters, ParameterStamp, TwinWeight

Keep = Callable[[TwinWeight], TwinWeight]
# Runs the model, calls back with the moments of each given weight, and returns the text in words.
Stream = Callable[[Sequence[Tensor], Callable[[Tensor, Moments], None]], str]
_TOGETHER = 4  # matmuls per thread: those of a block or two, so that no thread waits long
_numbers = itertools.count()  # of files


@dataclass
class Statistics:
    """Where a model's statistics come from: observed texts, else text that it samples."""

    observed: Observation | None = None
    own: SelfCalibration = field(default_factory=SelfCalibration)

    @property
    def number(self) -> int:
        """The observation's number, also after it was cleared."""
        return 0 if self.observed is None else self.observed.number

    def now(self) -> Statistics:
        """Return a copy, which later observations do not change."""
        return replace(self)

    def collect(self, *, refresh: bool = False) -> tuple[Observation | None, Stream | None]:
        """Return known statistics, or a function that streams those of the model's own text."""
        if self.observed is not None and self.observed.moments:
            return self.observed, None
        return None, functools.partial(self.own.stream_moments, resample=refresh)


@dataclass(frozen=True)
class Job:
    """How a program's weights are made, and which they are."""

    config: RiverConfig
    statistics: Statistics
    device: torch.device  # of the packed weights
    parameters: Mapping[Matmul, Parameters]
    digests: Mapping[Matmul, str]  # of the parameters
    refresh: bool = False  # parameters have changed: no file has their weights, and own text is sampled again
    can_wait: bool = False  # tokens run at full depth without the twins, so a result without them will do
    file: TwinFile | None = None  # of the options, which has the twins
    blocks: frozenset[Matmul] = frozenset()  # those of the layers' twins

    @property
    def twins(self) -> list[Matmul]:
        """The matmuls of the program's twins that tokens can reach."""
        return [matmul for matmul in self.parameters if not matmul.lossless]

    @property
    def observes(self) -> bool:
        """Whether weights are made with statistics."""
        return self.file is None and self.config.quantizer in OBSERVING

    @property
    def quick(self) -> Job | None:
        """The job whose twins draft until this one's are there; None if there is no faster one."""
        slow = self.file is None and self.config.quantizer in (*OBSERVING, UNOBSERVED)
        drafts = self.can_wait and self.config.budget is None  # an exit rule is tuned to the twins that were asked for
        return replace(self, config=replace(self.config, quantizer=QUICK)) if drafts and slow else None

    def quantizer(self, lossless: bool) -> str:
        return LOSSLESS if lossless else self.config.quantizer

    def key(self, matmul: Matmul) -> tuple[object, ...]:
        """Return the key of a weight besides its digest."""
        number = self.statistics.number if self.observes and not matmul.lossless else 0
        origin = "" if self.file is None or matmul.lossless else str(self.file.folder)
        how = self.quantizer(matmul.lossless), matmul.layout, matmul.group_size, matmul.scales_inputs
        return matmul.name, self.device, *how, origin, number

    def load(self, matmuls: Sequence[Matmul], file: TwinFile) -> dict[Matmul, TwinWeight]:
        """Load weights from a file. All are looked up before the first is packed: all or none fit."""
        asked = {matmul: self.quantizer(matmul.lossless) for matmul in matmuls}
        saved = {matmul: file.find(matmul, asked[matmul], self.digests[matmul]) for matmul in matmuls}

        def load(matmul: Matmul) -> TwinWeight:
            grid, facts = saved[matmul]
            made = pack_weight(
                matmul, self.parameters[matmul], self.digests[matmul], asked[matmul], grid, facts, self.device
            )
            return replace(made, folder=str(file.folder))

        return dict(zip(matmuls, in_threads(load, matmuls), strict=True))

    def make_unless_changed(
        self, matmuls: Sequence[Matmul], lossless: bool, keep: Keep = lambda made: made
    ) -> dict[Matmul, TwinWeight]:
        """Make weights; return none if parameters change meanwhile."""
        tensors = [tensor for matmul in matmuls for tensor in self.parameters[matmul].tensors]
        stamp = ParameterStamp(tensors)
        try:
            made = self.make(matmuls, lossless, keep)
        except Exception:  # whatever weights that change while they are read lead to
            if stamp == ParameterStamp(tensors):
                raise
            return {}
        return made if stamp == ParameterStamp(tensors) else {}

    def make(
        self, matmuls: Sequence[Matmul], lossless: bool, keep: Keep = lambda made: made
    ) -> dict[Matmul, TwinWeight]:
        """Make weights in threads; with streamed statistics, in the order in which the model reads them."""
        recorded, stream = None, None
        if self.observes and not lossless:
            recorded, stream = self.statistics.collect(refresh=self.refresh)
        known = {matmul: _moments(recorded, matmul, self.parameters[matmul]) for matmul in matmuls}
        found: dict[Matmul, TwinWeight] = {}
        weights = [self.parameters[matmul].weights[0] for matmul in matmuls]
        threads = threads_for(weights[0])
        with thread_pool(threads) as pool:

            def one(given: tuple[Matmul, Moments | None]) -> TwinWeight:
                matmul, moments = given
                asked = self.quantizer(lossless)
                return make_weight(matmul, self.parameters[matmul], self.digests[matmul], asked, moments, self.device)

            def work(jobs: Sequence[tuple[Matmul, Moments | None]]) -> None:
                for (matmul, _), twin in zip(jobs, pool.imap(one, jobs), strict=True):
                    found[matmul] = keep(twin)
                    stage_reached(len(found) / len(matmuls))
                    trim_heap()  # threads that take and free matrices of many sizes keep half as much again

            source = "" if recorded is None else recorded.source
            if stream is not None:
                source = _stream_and_make(stream, matmuls, weights, work, _TOGETHER * threads)
            left = [(matmul, known[matmul]) for matmul in matmuls if matmul not in found]
            for start in range(0, len(left), _TOGETHER * threads):  # (imap does not wait for what is kept)
                work(left[start : start + _TOGETHER * threads])
        for twin in found.values():
            if twin.output_sqnr is not None:
                twin.statistics = source
        return found


def _moments(recorded: Observation | None, matmul: Matmul, parameters: Parameters) -> Moments | None:
    """Return the recorded moments of a matmul's inputs, None without a record."""
    moments = None if recorded is None else recorded.moments_of(parameters.weights[0])
    if recorded is not None and moments is None:
        raise OptionError(
            f"Cannot calibrate {matmul.name}: no token of calibration_data= reached it. Give more texts before the "
            "first generation, set twins= to saved twins, or use quantizer='hqq'",
            id="RC007",
        )
    return moments


def _stream_and_make(
    stream: Stream,
    matmuls: Sequence[Matmul],
    weights: Sequence[Tensor],
    work: Callable[[Sequence[tuple[Matmul, Moments | None]]], None],
    together: int,
) -> str:
    """Stream weights' moments and work on a few at a time meanwhile, so that few moments are held."""
    of_weight = defaultdict[int, list[Matmul]](list)  # by the first weight of a matmul
    for matmul, weight in zip(matmuls, weights, strict=True):
        of_weight[id(weight)].append(matmul)
    waiting: list[tuple[Matmul, Moments | None]] = []
    failed: list[Exception] = []

    def see(weight: Tensor, moments: Moments) -> None:
        waiting.extend((matmul, moments) for matmul in of_weight[id(weight)])
        if len(waiting) >= together and not failed:
            try:
                work([*waiting])
            except Exception as error:  # not of the model, so it must not end the text
                failed.append(error)
            waiting.clear()

    source = stream(weights, see)
    if failed:
        raise failed[0]
    work(waiting)
    return source


def spilled(folder: Path, made: TwinWeight) -> TwinWeight:
    """Return a weight whose tensors lie in files of a folder, which no other process sees."""

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        file = folder / str(next(_numbers))
        tensor.contiguous().view(torch.uint8).numpy().tofile(file)
        mapped = torch.from_file(str(file), size=tensor.nbytes, dtype=torch.uint8)
        file.unlink()  # the system frees it with the mapping, however the process ends
        return mapped.view(tensor.dtype).view(tensor.shape)

    weight = made.weight
    weight = replace(weight, qweight=moved(weight.qweight), scale_zero=moved(weight.scale_zero))
    return replace(made, weight=weight)
