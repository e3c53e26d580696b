"""The packed weights of a model's twins: made once, shared by all its graphs, freed with the model, saved on request.

Each 4-bit matrix of a twin (a :class:`Matmul`) is quantized from the parameters it stands for, or its grid is read
from an artifact; packed in the layout of the kernel that will read it, on the parameters' device; and kept under its
first parameter, which is held weakly: when the model goes, so do its twins.

At the beginning of every sequence a graph's parameters are compared with those that its twins were made from. They are
inputs of the graph, so replaced parameters are seen too. If all look as they did (`parameter_stamp.py`), that takes a
millisecond for 200 matrices; otherwise their digests decide, and what changed is packed again in the tensors that
compiled code and captured graphs hold.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.config import RiverConfig
from river_compile.distributed.ranks import ALONE, Ranks
from river_compile.errors import RiverWarning
from river_compile.kernels.quant.grid import threads_for
from river_compile.passes.program import Matmul
from river_compile.progress import stage_reached, stage_shown
from river_compile.store.folder import enabled
from river_compile.twins.artifact import FILE, Artifact, write_missing
from river_compile.twins.calibration_stats import Moments, Observation
from river_compile.twins.packed import PackedMatmul, Quantized
from river_compile.twins.parameter_stamp import ParameterStamp, Sources, sources_of
from river_compile.twins.quantize import UNOBSERVED, Known, Maker, made_again, needs_moments
from river_compile.twins.self_calibration import SelfCalibration
from river_compile.twins.stored import StoredTwins
from river_compile.twins.twin_kl import TwinLoss

log = logging.getLogger("river_compile.twins")
T = TypeVar("T")
R = TypeVar("R")
# Has the model read matrices (those given), calls back with the moments of each, and returns what was read.
Read = Callable[[Sequence[Tensor], Callable[[Tensor, Moments], None]], str]
_TOGETHER = 4  # products for each thread: those of a block or two, so that no thread waits long


def changed_since(name: str) -> str:
    """Returns the message about a product whose parameters are not those that it was made from."""
    fix = "call river_compile.refresh(model) or generate a token first"
    return f"the weights of {name} changed after they were packed; {fix}"


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


class TwinRegistry:
    """All packed weights of one model.

    Attributes:
        stores: whether they are left for other processes, and taken from them.
        seconds: the time that making them took.
        loss: what the latest ones lose together, None where that is not known.
        renewals: how often weights were found changed.
        renewed: the number of matrices that were packed again the last time.
    """

    def __init__(self) -> None:
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by first parameter, then by how
        self._lock = threading.Lock()
        self._opened: Artifact | None = None
        self.stores = True
        self.seconds = 0.0
        self.loss: TwinLoss | None = None
        self._not_judged = False
        self._stored: StoredTwins | None = None
        self.renewals = self.renewed = 0

    def pack(
        self,
        sites: Sequence[Matmul],
        inputs: Sequence[Any],
        config: RiverConfig,
        statistics: Statistics,
        every: Iterable[str] = (),
        savable: Sequence[Matmul] = (),
    ) -> dict[Matmul, PackedMatmul]:
        """Returns the packed weights of the sites, making those that are missing.

        Args:
            sites: matmuls of twins, and of the backbone, whose weights are packed without loss.
            inputs: of the graph, real tensors.
            config: its `quantizer`, `artifact` and `on_missing_artifact` say how.
            statistics: for "awq" and "gptq".
            every: names of all products that the model can have; an artifact may hold no other.
            savable: what an artifact that is missing is to hold.

        Raises:
            ArtifactError: (a ``ValueError``) the artifact is damaged or not this model's; nothing of it is used.
            OptionError: (a ``ValueError``) a matrix was read by nothing that was observed.
        """
        with self._lock:
            start = time.perf_counter()
            sources = sources_of((*sites, *savable), inputs)
            artifact = None
            if config.artifact is not None:
                config = replace(config, artifact=statistics.ranks.folder(config.artifact))
                unsaved = Maker(replace(config, artifact=None, on_missing_artifact="raise"), None, statistics.number)
                told = self._told(unsaved, savable, config, statistics)
                artifact = self._open(config, lambda: [*self._make(unsaved, savable, sources, told).values()])
                artifact.check_names(every)
            maker = Maker(config, artifact, statistics.number)
            lossless = Maker(config, None, 0, lossless=True)
            maker_of = {site: lossless if site.lossless else maker for site in sites}
            found = {s: made for s in sites if (made := self._find(s, sources[s], maker_of[s])) is not None}
            missing = [site for site in sites if site not in found]
            made_now: dict[Matmul, PackedMatmul] = {}
            for how in (lossless, maker):
                sites_of = [site for site in missing if maker_of[site] is how]
                made_now |= self._make_or_recall(how, sites_of, sources, statistics)
            for site, made in made_now.items():
                self._packed.setdefault(sources[site].weights[0], {})[made.key] = made
                found[site] = made
            self.seconds += time.perf_counter() - start
            return found

    def judge(self, twins: Iterable[PackedMatmul], statistics: Statistics) -> None:
        """Estimates the joint loss of a graph's twins, if some were made with statistics since the last time."""
        if not statistics.ranks.every(not self._not_judged):
            self.loss, self._not_judged = statistics.own.loss(twins), False
            if self._stored is not None:
                self._stored.write_loss(self.loss)

    def all(self, *, lossless: bool = False) -> list[PackedMatmul]:
        """Returns all packed matmuls of twins; if that is asked for, those of the backbone too."""
        made = [site for sites in self._packed.values() for site in sites.values()]
        return [site for site in made if lossless or not site.linear.lossless]

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, parameters may move to other addresses, with the values that they have."""
        alike = [(site, sources) for site in self.all(lossless=True) if (sources := site.fresh_sources()) is not None]
        yield
        for site, sources in alike:
            site.stamp = ParameterStamp(sources.tensors)

    def renew(
        self,
        sites: Iterable[tuple[PackedMatmul, Sources]],
        statistics: Statistics,
        *,
        thorough: bool = False,
    ) -> int:
        """Packs those sites again, in place, that do not stand for the parameters beside them; says so once.

        Args:
            sites: each with the parameters that it is to stand for, of the shapes, dtypes and devices of its own.
            statistics: what was observed before the change is used, and text of the model's own is sampled anew; a
                matrix that neither reached is quantized from its weights alone.
            thorough: read all weights, instead of those that look different.

        Returns:
            The number of those sites.
        """
        with self._lock:
            start = time.perf_counter()
            pairs = list(sites)
            for site, sources in pairs:
                self._keep_under(sources.weights[0], site)
            changed = []
            for lossless in (True, False):  # (another graph may have renewed the former, which tells twins' digests)
                some = [pair for pair in pairs if pair[0].linear.lossless == lossless]
                alike = _in_threads(lambda pair: pair[0].stands_for(pair[1], thorough=thorough), some)
                changed += [pair for pair, same in zip(some, alike, strict=True) if not same]
            unneeded = statistics.ranks.every(not any(needs_moments(site) for site, _ in changed))
            recorded, read = (None, None) if unneeded else statistics.take(anew=True)
            known = [
                recorded.moments_of(sources.weights[0]) if recorded is not None and needs_moments(site) else None
                for site, sources in changed
            ]
            with stage_shown("packing changed weights") if changed else contextlib.nullcontext():
                made = _packed(changed, known, recorded, made_again, read)
            for (site, _), new in zip(changed, made, strict=True):
                site.become(new)
            twins = [site for site, _ in changed if not site.linear.lossless]
            if twins:
                self.loss, seconds = None, time.perf_counter() - start
                self.seconds += seconds
                self.renewals, self.renewed = self.renewals + 1, len(twins)
                self._tell(twins, seconds)
            return len(twins)

    def _told(self, maker: Maker, sites: Sequence[Matmul], config: RiverConfig, statistics: Statistics) -> Statistics:
        """Returns the statistics for an artifact that may be missing, on several ranks taken already.

        They run the model on all ranks, which a rank must not do while others wait for the artifact's lock.
        """
        if not statistics.ranks.several or config.on_missing_artifact != "save":
            return statistics
        there = statistics.ranks.every((Path(config.artifact or "") / FILE).exists())
        if there or not sites or not maker.needs_statistics:
            return statistics
        return replace(statistics, observed=statistics.take()[0])

    def _open(self, config: RiverConfig, make: Callable[[], Sequence[PackedMatmul]]) -> Artifact:
        """Returns the artifact that the options name, made where it is missing and the options say so."""
        folder = Path(config.artifact or "")
        if config.on_missing_artifact == "save":
            write_missing(folder, make)
        if self._opened is None or self._opened.folder != folder:
            self._opened = Artifact(folder)
        return self._opened

    def _make_or_recall(
        self, maker: Maker, sites: Sequence[Matmul], sources: Mapping[Matmul, Sources], statistics: Statistics
    ) -> dict[Matmul, PackedMatmul]:
        """Packs products, unless an earlier process has left them in the store."""
        own = maker.artifact is not None or (statistics.observed is not None and not maker.lossless)
        if own or not self.stores or statistics.ranks.several or not sites or not enabled():
            return self._make(maker, sites, sources, statistics)
        _in_threads(lambda site: sources[site].digest, sites)
        stored = StoredTwins(sites, sources, maker.quantizer)
        if not maker.lossless:
            self._stored = stored
        artifact = stored.open()
        if artifact is None:
            made = self._make(maker, sites, sources, statistics)
            stored.write([*made.values()])
            return made
        made = self._make(replace(maker, artifact=artifact), sites, sources, statistics)
        if not maker.lossless:
            self.loss = stored.loss
            self._not_judged = maker.needs_statistics and self.loss is None
        return {site: replace(twin, key=maker.key(site)) for site, twin in made.items()}

    def _make(
        self, maker: Maker, sites: Sequence[Matmul], sources: Mapping[Matmul, Sources], statistics: Statistics
    ) -> dict[Matmul, PackedMatmul]:
        """Packs products; each is looked up before the first is packed, since an artifact fits as a whole or not."""
        read = None
        if sites and maker.needs_statistics:
            recorded, read = statistics.take()
            maker, self._not_judged = replace(maker, observation=recorded), True
        pairs = [(site, sources[site]) for site in sites]
        known = _in_threads(lambda pair: maker.look_up(*pair), pairs)
        if sites and threads_for(sources[sites[0]].weights[0]) == 1:  # (hashing needs no memory of the device)
            _in_threads(lambda pair: pair[1].digest, pairs)
        made = _packed(pairs, known, maker.observation, maker.make, read)
        return dict(zip(sites, made, strict=True))

    def _find(self, site: Matmul, sources: Sources, maker: Maker) -> PackedMatmul | None:
        made: PackedMatmul | None = self._packed.get(sources.weights[0], {}).get(maker.key(site))
        same = made is not None and made.sources.kinds == sources.kinds and made.stands_for(sources)
        return made if same else None

    def _keep_under(self, weight: Tensor, site: PackedMatmul) -> None:
        """Keeps a site under the parameter that has taken its first parameter's place."""
        sources = site.sources.get()
        if sources is None or sources.weights[0] is not weight:
            if sources is not None:
                self._packed.get(sources.weights[0], {}).pop(site.key, None)
            self._packed.setdefault(weight, {})[site.key] = site

    def _tell(self, changed: Sequence[PackedMatmul], seconds: float) -> None:
        """Reports packings that were made again: the first time as a warning, then in the log, for those who train."""
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        message = (
            f"weights changed after their 4-bit twins were packed ({changed[0].name}{others}); the twins were packed "
            f"again in {seconds:.1f} s"
        )
        observed = sum(site.statistics.endswith("observed tokens") for site in changed)
        if observed:
            message += f", {observed} with what was observed before; river_compile.observe takes new statistics"
        if any(site.quantizer == UNOBSERVED != site.asked for site in changed):
            message += f". Matrices that were not observed took quantizer={UNOBSERVED!r}"
        if self.renewals == 1:
            hint = "Later changes are only logged and counted in the report."
            warnings.warn(f"{message}. {hint}", RiverWarning, stacklevel=2)
        log.info("%s", message)


def _in_threads(function: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return [*pool.map(function, jobs)]


def _packed(
    pairs: Sequence[tuple[T, Sources]],
    known: Sequence[Known],
    recorded: Observation | None,
    make: Callable[[T, Sources, Known], PackedMatmul],
    read: Read | None,
) -> list[PackedMatmul]:
    """Packs products in threads, in the order in which the model reads them where it is to.

    Args:
        pairs: the products, each with its parameters.
        known: what is known of each.
        recorded: where moments among that are from.
        make: packs one.
        read: has the model read them. Products are packed some at a time, in the middle of that, so that few moments
            are held at once.
    """
    if not pairs:
        return []
    made: dict[int, PackedMatmul] = {}
    waiting: list[tuple[int, Known]] = []
    failed: list[Exception] = []
    numbers = defaultdict[int, list[int]](list)  # by the matrix that stands for all of a product
    for number, (_, sources) in enumerate(pairs):
        numbers[id(sources.weights[0])].append(number)

    threads = threads_for(pairs[0][1].weights[0])
    with ThreadPoolExecutor(threads) as pool:

        def one(job: tuple[int, Known]) -> PackedMatmul:
            product, sources = pairs[job[0]]
            return make(product, sources, job[1])

        def work() -> None:
            jobs = waiting.copy()
            waiting.clear()
            for (number, _), twin in zip(jobs, pool.map(one, jobs), strict=True):
                made[number] = twin
                stage_reached(len(made) / len(pairs))

        def see(weight: Tensor, moments: Moments) -> None:
            waiting.extend((number, moments) for number in numbers[id(weight)])
            if len(waiting) >= _TOGETHER * threads and not failed:
                try:
                    work()
                except Exception as error:  # (which is not the model's)
                    failed.append(error)

        source = "" if recorded is None else recorded.source
        if read is not None:
            source = read([sources.weights[0] for _, sources in pairs], see)
        if failed:
            raise failed[0]
        seen = {*made, *(number for number, _ in waiting)}
        waiting += [(number, known[number]) for number in range(len(pairs)) if number not in seen]
        work()
    for number, twin in made.items():
        if twin.output_sqnr is not None and not isinstance(known[number], Quantized):
            twin.statistics = source
    return [made[number] for number in range(len(pairs))]


class TwinWatch:
    """Repacks one graph's twins if their parameters changed.

    Args:
        packed: its packed matmuls.
        twins: all packed weights of the model.
        statistics: returns what quantizers may know.
        adopt: notes parameters that were put in the place of some of the model's.
    """

    def __init__(
        self,
        packed: Mapping[Matmul, PackedMatmul],
        twins: TwinRegistry,
        statistics: Callable[[], Statistics],
        adopt: Callable[[Iterable[Tensor]], object],
    ) -> None:
        self._packed, self._order = packed, [number for linear in packed for number in linear.parameters]
        self._twins, self._statistics, self._adopt = twins, statistics, adopt
        self._look()

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Packs those again that do not stand for the parameters among the graph's inputs."""
        statistics, parameters = self._statistics(), [inputs[i] for i in self._order]
        if statistics.ranks.every(self._stamp == ParameterStamp(parameters)):
            return
        self._adopt(parameters)
        sources = sources_of(self._packed, inputs)
        self._twins.renew([(made, sources[linear]) for linear, made in self._packed.items()], statistics)
        self._look()

    def _look(self) -> None:
        """Notes how the parameters looked when they were packed, or last compared."""
        self._stamp = ParameterStamp.together(made.stamp for made in self._packed.values())
