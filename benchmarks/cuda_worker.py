"""Measures one backend of `benchmarks.decode --device cuda` inside its process; see `benchmarks.cuda_decode`."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks import common
from benchmarks.random_llama import random_llama
from benchmarks.roofline import Roofline, depth_name
from river_compile import Report, report
from river_compile.cli.timing import generate
from river_compile.cudagraphs.device import CaptureLog
from river_compile.exits import forced_depth
from river_compile.upstream.hf_cache import cache_argument, crop

_WARM_UP = 4  # tokens: the first runs, the second is captured
_REPEATS = 3
_PROFILED = 4


def measure(
    name: str, backend: str, depths: list, context: int, group_size: int, new_tokens: int, device: str = "cuda"
) -> dict:
    """Measures a backend; returns its rows and, of River, the seconds that one exit check costs.

    Args:
        name: a Llama of ``river_compile.kernels.tools.shapes.MODELS``.
        backend: "eager", "inductor" or "river".
        depths: River's exit depths, None for never leaving.
        context: tokens of the prompt.
        group_size: of the twins.
        new_tokens: tokens that are timed at a time.
        device: where.
    """
    torch.set_grad_enabled(False)
    roofline = Roofline(name, context, group_size)
    model = random_llama(roofline.shape, device)
    loop = Loop(model, context, new_tokens, static=backend != "eager")
    if backend == "inductor":
        model.compile(mode="reduce-overhead")
    if backend != "river":
        return {"rows": [_row(loop, backend, backend, None, roofline)]}
    # Checks after every block that never let a token leave: what is measured without them forces its depth.
    options = {"threshold": 2.0, "first_exit": 1, "quantizer": "rtn", "group_size": group_size}
    model.compile(backend="river", options=options)
    blocks = roofline.shape.layers
    rows = []
    for depth in depths:
        seconds, size = _captured(report(model))
        with forced_depth(blocks if depth is None else depth):
            rows.append(_row(loop, f"river {depth_name(depth)}", backend, depth, roofline))
        after = _captured(report(model))
        rows[-1] |= {"capture_s": after[0] - seconds, "capture_bytes": after[1] - size}
    with forced_depth(blocks):
        never = loop.seconds_per_token()
    one = (loop.seconds_per_token() - never) / (blocks - 1)
    return {"rows": rows, "check": {"seconds": one, "count": blocks - 1}}


def _row(loop: Loop, name: str, backend: str, depth: int | None, roofline: Roofline) -> dict:
    """Measures one row of the table."""
    seconds = loop.seconds_per_token()
    kernels, graphs = loop.launches()
    return {
        "name": name,
        "backend": backend,
        "depth": depth,
        "tokens_per_s": 1 / seconds,
        "generate_tokens_per_s": loop.generate_rate(),
        "bytes": roofline.token(depth).bytes,
        "kernels": kernels,
        "graphs": graphs,
        "capture_s": None,
        "capture_bytes": None,
    }


def _captured(found: Report) -> tuple[float, int]:
    """Returns seconds and bytes of the captures so far."""
    logs = [graph.of(CaptureLog) for graph in found.graphs]
    return sum(log.seconds for log in logs), sum(log.bytes for log in logs)


class Loop:
    """Decodes greedily after one prompt, again and again on one cache.

    Args:
        model: whatever ``model(...)`` runs is timed.
        context: tokens of the prompt.
        new_tokens: tokens that are timed at a time.
        static: whether the cache is static or grows.
    """

    def __init__(self, model: PreTrainedModel, context: int, new_tokens: int, static: bool) -> None:
        self.model, self.new_tokens, self._static = model, new_tokens, static
        self._device = next(model.parameters()).device
        slots = context + new_tokens
        self._cache = StaticCache(config=model.config, max_cache_len=slots) if static else DynamicCache()
        self._held = {cache_argument(model): self._cache, "use_cache": True}
        self._prompt = torch.randint(model.config.vocab_size, (1, context), device=self._device)
        position = torch.arange(slots, device=self._device)
        self._masks = position[:, None] >= position  # [slots, slots]: as `generate` makes them, over the whole cache
        self._filled = False

    def seconds_per_token(self) -> float:
        """Returns the median over a few rounds; compiles, warms up and captures first."""
        if not self._filled:
            self._call(self._prompt, 0)
            self._filled = True
        self._round(min(_WARM_UP, self.new_tokens))
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return statistics.median(self._round(self.new_tokens) for _ in range(_REPEATS)) / self.new_tokens

    def launches(self) -> tuple[int | None, int | None]:
        """Returns kernels and launches of captured graphs per token; None without a GPU."""
        if self._device.type != "cuda":
            return None, None
        tokens = min(_PROFILED, self.new_tokens)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            self._round(tokens)
        events = profiled.events()
        on_device = [e.name for e in events if e.device_type == DeviceType.CUDA]
        kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
        graphs = sum(e.name in ("cudaGraphLaunch", "hipGraphLaunch") for e in events)
        return round(kernels / tokens), round(graphs / tokens)

    def generate_rate(self) -> float:
        """Returns the decode tokens/s of `model.generate` after the same prompt, the second time."""
        generate(self.model, self._prompt, self.new_tokens, static_cache=self._static)
        return generate(self.model, self._prompt, self.new_tokens, static_cache=self._static).decode_tokens_per_s

    def _round(self, tokens: int) -> float:
        """Decodes so many tokens, takes them back, and returns the seconds that decoding took."""
        ids, filled = self._prompt[:, -1:], self._prompt.shape[1]
        self._synchronize()
        start = time.perf_counter()
        for position in range(filled, filled + tokens):
            torch.compiler.cudagraph_mark_step_begin()
            ids = self._call(ids, position)[:, -1:].argmax(-1)
        self._synchronize()
        seconds = time.perf_counter() - start
        crop(self._cache, tokens)
        return seconds

    def _call(self, ids: Tensor, start: int) -> Tensor:
        """Runs ids that begin at a position and returns their logits."""
        stop = start + ids.shape[1]
        mask = self._masks[start:stop][None, None] if self._static else None
        positions = torch.arange(start, stop, device=self._device)[None]
        return self.model(input_ids=ids, position_ids=positions, attention_mask=mask, **self._held).logits

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    common.serve({"measure": measure})
