"""Measures one backend's rows of `benchmarks.decode --device cuda` in its process; see `benchmarks.cuda_decode`."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks import common
from benchmarks.estimate import exact_cycle
from benchmarks.int4_baseline import use_int4
from benchmarks.random_llama import random_llama
from benchmarks.roofline import Roofline
from benchmarks.schedule import leaving_at
from river_compile import report
from river_compile.backend import executors_of
from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.mode import decode, exact
from river_compile.exits import WHOLE, forced_depth
from river_compile.reporting.timing import generate
from river_compile.runtime.captures import CaptureLog
from river_compile.runtime.state import on_step
from river_compile.runtime.stats import CycleRecord, cycles
from river_compile.upstream.transformers import cache_argument

_WARM_UP = 4  # tokens: the first runs, the second is captured
_REPEATS = 3
_PROFILED = 4
_UNPROFILED = 2  # cycles of exact mode: transformers makes the inputs of a width's first two passes
_COMPARED = 16  # tokens whose logits are compared with those of plain transformers
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
#: Inductor's settings of each baseline: what `mode="reduce-overhead"` is, and with tuned products.
INDUCTOR = {
    "inductor": {"triton.cudagraphs": True},
    "inductor tuned": {"triton.cudagraphs": True, "coordinate_descent_tuning": True, "max_autotune": True},
    "int4": {"triton.cudagraphs": True, "coordinate_descent_tuning": True},
}
#: River's options. "river" checks after every block and never lets a token leave: what is measured without checks
#: forces its depth. "exact" is what `accelerate(strict=True)` needs.
RIVER: dict[str, dict[str, object]] = {
    "river": {"threshold": 2.0, "first_exit": 1},
    "exact": {"first_exit": WHOLE, "target_kernels": "river", "target_weights": "model"},
}


class NotGraphed(RuntimeError):
    """A baseline that was to be replayed as CUDA graphs ran without; its speed would flatter everything else."""


class Bench:
    """One backend: a model, compiled or not, and a loop that decodes with it."""

    def prepare(
        self, name: str, backend: str, context: int, group_size: int, new_tokens: int, device: str = "cuda"
    ) -> dict:
        """Build the model and send the prompt; return the seconds that this took.

        Args:
            name: a Llama of ``tools.kernels.shapes.MODELS``.
            backend: "eager" or a key of `RIVER` or `INDUCTOR`; "int4" has 4-bit products of torch's in its place.
            context: tokens of the prompt.
            group_size: of 4-bit weights.
            new_tokens: tokens that are timed at a time.
            device: where.
        """
        start = time.perf_counter()
        torch.set_grad_enabled(False)
        self.backend, self._roofline = backend, Roofline(name, context, group_size)
        self.model = random_llama(self._roofline.shape, device)
        self.loop = Loop(self.model, context, new_tokens, static=backend != "eager")
        self._plain = self.loop.logits(plain=True)
        if backend == "int4":
            use_int4(self.model, group_size)
        if backend in INDUCTOR:
            torch._dynamo.utils.counters.clear()
            self.model.compile(options=INDUCTOR[backend])
        elif backend in RIVER:
            options = {**RIVER[backend], "quantizer": "rtn", "group_size": group_size}
            self.model.compile(backend="river", options=options)
        return {"seconds": time.perf_counter() - start}

    def row(self, depth: int | None, asked: bool = False, generates: bool = True) -> dict:
        """Measure one row.

        Args:
            depth: River's exit depth, None for full depth and for other backends.
            asked: whether every check on the way is read, instead of a depth that is known before.
            generates: whether `model.generate` is timed too.

        Raises:
            NotGraphed: a baseline of CUDA graphs ran without them.
        """
        seconds, size, made = self._captured()
        self._reset_peak()
        with self.leaving(depth, asked):
            times = self.loop.seconds_per_token()
            found = self.loop.profiled() | self._against_plain()
            after = self._captured()
            rates = self.loop.generate_rates(kept=self.backend != "eager") if generates else (None, None)
        self._check_graphs()
        median = statistics.median(times)
        busy = found.pop("device_seconds")
        return {
            "backend": self.backend,
            "depth": depth,
            "asked": asked,
            "seconds": times,
            "tokens_per_s": 1 / median,
            "generate_tokens_per_s": rates[0],
            "kept_tokens_per_s": rates[1],
            "bytes": self._roofline.token(0 if self.backend == "int4" else depth).bytes,
            "busy": None if busy is None else busy / median,
            **found,
            "capture_s": after[0] - seconds if self.backend == "river" else None,
            "capture_bytes": after[1] - size if self.backend == "river" else None,
            "captures": after[2] - made if self.backend == "river" else None,
            "peak_bytes": self._peak(),
        }

    def exact_row(self, drafted: int, holds: Sequence[float]) -> dict:
        """Measure exact mode with drafts of one length, all of them from the twins.

        Args:
            drafted: tokens of a draft; the loop's new tokens are at least three more.
            holds: probabilities that a drafted token holds where those before it did, to say what they would give.

        Raises:
            ExactModeError: verified text might have other bits than plain decoding's.
        """
        self._reset_peak()
        with forced_depth(self._roofline.shape.layers):
            self.loop.text(custom_generate=decode)
            plain, plain_seconds = self.loop.text_in_steps(custom_generate=decode)
        how = {"custom_generate": exact, "num_assistant_tokens": drafted, "strict": True}
        how |= {"prompt_lookup_num_tokens": 0, "num_assistant_tokens_schedule": "constant"}
        for _ in range(2):  # (the first one compiles each width's pass, the second one captures it)
            self.loop.text(**how)
        ran, times, texts = [], [], []
        for _ in range(_REPEATS):
            text, seen, seconds = self.loop.text_in_cycles(**how)
            texts.append(text)
            times.append(seconds)
            ran += seen
        parts = [i for text in texts for i, (a, b) in enumerate(zip(text, plain, strict=True)) if a != b]
        whole = [cycle for cycle in ran if len(cycle.drafted) == drafted]
        draft, verify, rest = (statistics.median(cycle.seconds[i] for cycle in whole) for i in range(3))
        seconds = statistics.median(sum(cycle.seconds) for cycle in whole)
        paper = [exact_cycle(self._roofline, hold, "dense", "dense", drafted) for hold in holds]
        drafts = drafted * paper[0]["draft_seconds"]
        found = self.loop.profiled_cycles(**how)
        busy = found.pop("device_seconds")
        return {
            "backend": self.backend,
            "drafted": drafted,
            "width": whole[0].width,
            "parts_at": min(parts, default=None),
            "seconds": sorted(times),
            "tokens_per_s": 1 / statistics.median(times),
            "cycles": len(ran),
            "tokens_per_cycle": sum(len(cycle.emitted) for cycle in ran) / len(ran),
            "held": sum(cycle.accepted for cycle in ran) / sum(len(cycle.drafted) for cycle in ran),
            "cycle": {
                "draft": draft / drafted,
                "verify": verify,
                "rest": rest,
                "seconds": seconds,
                "plain": plain_seconds,
            },
            "modelled": {
                "draft": paper[0]["draft_seconds"],
                "verify": paper[0]["verify_seconds"],
                "rest": paper[0]["seconds"] - drafts - paper[0]["verify_seconds"],
                "seconds": paper[0]["seconds"],
                "plain": paper[0]["over_plain"] / paper[0]["tokens_per_s"],
            },
            "holds": [
                {
                    "hold": row["hold"],
                    "tokens_per_cycle": row["tokens_per_cycle"],
                    "tokens_per_s": row["tokens_per_cycle"] / seconds,
                    "over_plain": row["tokens_per_cycle"] / seconds * plain_seconds,
                    "modelled_tokens_per_s": row["tokens_per_s"],
                    "modelled_over_plain": row["over_plain"],
                }
                for row in paper
            ],
            "busy": None if busy is None else busy / seconds,
            **found,
            "peak_bytes": self._peak(),
        }

    @contextlib.contextmanager
    def leaving(self, depth: int | None, asked: bool) -> Iterator[None]:
        """Make River's tokens leave at a depth."""
        if self.backend != "river":
            yield
            return
        blocks = self._roofline.shape.layers
        depth = blocks if depth is None else depth
        with forced_depth(blocks):  # (compiles, where no row has)
            self.loop.round(1)
        decoding = [executor for executor in executors_of(self.model) if executor.decodes]
        policies = [executor.policy for executor in decoding]
        for executor, policy in zip(decoding, policies, strict=True):
            if asked:
                executor.policy = replace(policy, threshold=leaving_at(depth))
        try:
            with contextlib.nullcontext() if asked else forced_depth(depth):
                yield
        finally:
            for executor, policy in zip(decoding, policies, strict=True):
                executor.policy = policy

    def _against_plain(self) -> dict:
        """Compare logits with those of plain transformers: equal choices, least cosine, whether any is no number."""
        ours, plain = self.loop.logits().double(), self._plain.double()
        cosine = torch.nn.functional.cosine_similarity(ours, plain, dim=-1).amin().item()
        same = (ours.argmax(-1) == plain.argmax(-1)).double().mean().item()
        return {"argmax": same, "cosine": None if math.isnan(cosine) else cosine, "nan": bool(ours.isnan().any())}

    def _check_graphs(self) -> None:
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        if self.backend in INDUCTOR and skips:
            raise NotGraphed(f"Inductor left out CUDA graphs {skips} times, so this is no baseline")

    def _captured(self) -> tuple[float, int, int]:
        """Return seconds, bytes and number of the captures so far."""
        logs = self._logs()
        return sum(log.seconds for log in logs), sum(log.bytes for log in logs), sum(log.made for log in logs)

    def _logs(self) -> list[CaptureLog]:
        return [graph.captures for graph in report(self.model).graphs] if self.backend == "river" else []

    def _reset_peak(self) -> None:
        if self.loop.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.loop.on_gpu else None


class Loop:
    """Decodes greedily after one prompt, again and again on one cache.

    The prompt goes through the plain model, before anything is compiled: a static cache that Dynamo sees being made is
    not marked as memory that stays, and Inductor then leaves out its CUDA graphs.

    Args:
        model: whatever ``model(...)`` runs is timed.
        context: tokens of the prompt.
        new_tokens: tokens that are timed at a time.
        static: whether the cache is static or grows.
    """

    def __init__(self, model: PreTrainedModel, context: int, new_tokens: int, static: bool) -> None:
        self.model, self.new_tokens, self._static = model, new_tokens, static
        self._device = next(model.parameters()).device
        self.on_gpu = self._device.type == "cuda"
        self._slots = context + max(new_tokens, _COMPARED)
        self.cache = self._new_cache()
        vocabulary = model.config.vocab_size
        self._prompt = torch.randint(vocabulary, (1, context), device=self._device)
        self._fed = torch.randint(vocabulary, (1, _COMPARED), device=self._device)
        position = torch.arange(self._slots, device=self._device)
        self._masks = position[:, None] >= position  # [slots, slots]: as `generate` makes them, over the whole cache
        self._call(self._prompt, 0, plain=True)

    def seconds_per_token(self) -> list[float]:
        """Return those of a few rounds, ascending; compiles, warms up and captures first."""
        self.round(min(_WARM_UP, self.new_tokens))
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return sorted(self.round(self.new_tokens) / self.new_tokens for _ in range(_REPEATS))

    def logits(self, plain: bool = False) -> Tensor:
        """Return those of given tokens after the prompt, ``[tokens, V]``; `plain`: by the model as it is."""
        start = self._prompt.shape[1]
        steps = [self._call(ids, start + i, plain)[0, -1:] for i, ids in enumerate(self._fed.split(1, 1))]
        self._take_back(_COMPARED)
        return torch.cat(steps)

    def _take_back(self, tokens: int) -> None:
        if self._static:
            KVCache(self.cache).rewind(tokens)
        else:
            self.cache.crop(-tokens)

    def profiled(self) -> dict:
        """Return kernels, graph launches, waits and the device's seconds per token; None for each without a GPU."""
        if not self.on_gpu:
            return dict.fromkeys(("kernels", "graphs", "waits", "device_seconds"))
        tokens = min(_PROFILED, self.new_tokens)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            self.round(tokens)
        return counted(found.events(), tokens)

    def text(self, **how: Any) -> list[int]:
        """Return the new tokens of `model.generate` after the same prompt."""
        how |= {"max_new_tokens": self.new_tokens, "do_sample": False, "disable_compile": True}
        ids = self.model.generate(self._prompt, attention_mask=torch.ones_like(self._prompt), **how)
        return ids[0, self._prompt.shape[1] :].tolist()

    def text_in_steps(self, **how: Any) -> tuple[list[int], float]:
        """Return a text without drafts, and the seconds per token from its first decode step on."""
        at: list[float] = []
        with on_step(lambda state, step: at.append(time.perf_counter())):
            text = self.text(**how)
        _, first, *_, last = at  # (before them the prompt's)
        return text, (last - first) / (len(at) - 2)

    def text_in_cycles(self, **how: Any) -> tuple[list[int], list[CycleRecord], float]:
        """Return a text, its cycles of exact mode, and the seconds per token from the end of the first one on."""
        seen: list[tuple[CycleRecord, float]] = []
        with cycles.added(lambda cycle: seen.append((cycle, time.perf_counter()))):
            text = self.text(**how)
        tokens = sum(len(cycle.emitted) for cycle, _ in seen[1:])
        return text, [cycle for cycle, _ in seen], (seen[-1][1] - seen[0][1]) / tokens

    def profiled_cycles(self, **how: Any) -> dict:
        """Return what :meth:`profiled` does per cycle of exact mode."""
        nothing = dict.fromkeys(("kernels", "graphs", "waits", "device_seconds"))
        if not self.on_gpu:
            return nothing
        seen, found, kinds = 0, None, [ProfilerActivity.CPU, ProfilerActivity.CUDA]

        def ended(cycle: CycleRecord) -> None:
            nonlocal seen, found
            seen += 1
            if seen == _UNPROFILED:
                found = profiling.enter_context(profile(activities=kinds))
            elif seen == _UNPROFILED + _PROFILED:
                profiling.close()

        with contextlib.ExitStack() as profiling, cycles.added(ended):
            self.text(**how)
        if found is None or seen == _UNPROFILED:
            return nothing
        count = min(seen - _UNPROFILED, _PROFILED)
        return counted(found.events(), count, own=0)

    def generate_rates(self, kept: bool) -> tuple[float, float | None]:
        """Return the decode tokens/s of `model.generate` after the same prompt, the second time.

        First with the cache that it makes in every call, then (`kept`) with one that both calls share.
        """
        return self._generate_rate(), self._generate_rate(self._new_cache()) if kept else None

    def round(self, tokens: int) -> float:
        """Decode so many tokens, take them back, and return the seconds that decoding took."""
        ids, filled = self._prompt[:, -1:], self._prompt.shape[1]
        self._synchronize()
        start = time.perf_counter()
        for position in range(filled, filled + tokens):
            torch.compiler.cudagraph_mark_step_begin()
            ids = self._call(ids, position)[:, -1:].argmax(-1)
        self._synchronize()
        seconds = time.perf_counter() - start
        self._take_back(tokens)
        return seconds

    def _generate_rate(self, cache: StaticCache | None = None) -> float:
        held: dict[str, Any] = {} if cache is None else {cache_argument(self.model): cache}
        rate = 0.0
        for _ in range(2):
            if cache is not None:
                cache.reset()
            static = self._static and cache is None
            rate = generate(self.model, self._prompt, self.new_tokens, static, **held).decode_tokens_per_s
        return rate

    def _new_cache(self) -> StaticCache | DynamicCache:
        return StaticCache(config=self.model.config, max_cache_len=self._slots) if self._static else DynamicCache()

    def _call(self, ids: Tensor, start: int, plain: bool = False) -> Tensor:
        """Run ids that begin at a position and return their logits."""
        stop = start + ids.shape[1]
        mask = self._masks[start:stop][None, None] if self._static else None
        positions = torch.arange(start, stop, device=self._device)[None]
        held = {cache_argument(self.model): self.cache, "use_cache": True}
        call = self.model.forward if plain else self.model
        return call(input_ids=ids, position_ids=positions, attention_mask=mask, **held).logits

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def counted(events: Iterable[Any], tokens: int, own: int = 2) -> dict:
    """Return what a profile of so many tokens says per token: kernels, graph launches, waits, the device's seconds.

    `own` waits are the measurement's, such as two of the loop.
    """
    events = list(events)
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)
    graphs = sum(event.name in ("cudaGraphLaunch", "hipGraphLaunch") for event in events)
    waits = sum(event.name in _WAITS for event in events) - own
    busy = covered((event.time_range.start, event.time_range.end) for event in on_device) / 1e6
    per_token = {"kernels": kernels, "graphs": graphs, "waits": max(waits, 0)}
    return {name: round(count / tokens) for name, count in per_token.items()} | {"device_seconds": busy / tokens}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of what intervals cover together."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main(arguments: list[str] | None = None) -> int:
    """Answer what `benchmarks.cuda_decode` asks; return 0."""
    bench = Bench()
    common.serve({"prepare": bench.prepare, "row": bench.row, "exact": bench.exact_row})
    return 0


if __name__ == "__main__":
    main()
