"""What kernels that start early gain: twins one after the other, captured with and without it, on the GPU at hand.

    python -m benchmarks.early_start [--model llama-3.1-8b] [--context 1024] [--rounds 7] [--json FILE]

A twin is five launches, each of which reads what the one before wrote, and buffers are used again by the next twin, as
in a captured step. Both graphs hold the same kernels with the same tiles on the same tensors, of more twins than fit a
cache. Rounds of replays take turns, and the medians are compared. Beside the times stands whether all results are the
same bits, for inputs that change from replay to replay: a kernel that had read too soon would show.

Needs an NVIDIA GPU from sm_90 on; the exit status is 1 where there is none, or where a result differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common, gpu_facts
from river_compile.kernels.triton.devices import DEFAULT_DEVICE, device_name, starts_early
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import load
from river_compile.kernels.triton.spec import Buffer, KernelSpec
from tools.kernels.shapes import MODELS, ModelShape, cost_of, model_kernels
from tools.kernels.tune import replay_seconds

_BEYOND_CACHE = 256 * 2**20
_REPLAYS = 20  # of one round
_COMPARED = 8  # replays whose results are compared


class Twins:
    """Some twins with random weights, one after the other, as `run` launches them on ``hidden``.

    Args:
        shape: of the model.
        count: how many twins.
        context: slots of each cache, all filled but for the last.
        device: "cuda", or "cpu" for Triton's interpreter.
    """

    def __init__(self, shape: ModelShape, count: int, context: int, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._name = device_name(torch.cuda.current_device()) if self._on_gpu else DEFAULT_DEVICE
        self._shape, self._context, self._device = shape, context, device
        random = torch.Generator(device).manual_seed(0)
        specs = self.kernels(early=False)
        self._own = [{label: _parameters(spec, random) for label, spec in specs.items()} for _ in range(count)]
        sizes = {"hidden": shape.hidden, "qkv": shape.qkv, "heads": shape.heads * shape.head_dim}
        sizes |= {"between": shape.hidden, "mlp": shape.intermediate}
        self._shared = {n: torch.zeros(1, s, dtype=torch.bfloat16, device=device) for n, s in sizes.items()}
        self.hidden = self._shared["hidden"]
        self.counters = torch.zeros(count, 1, dtype=torch.int64, device=device)
        angle = torch.randn(1, shape.head_dim, generator=random, device=device)
        self._tables = {"cos": angle.cos().bfloat16(), "sin": angle.sin().bfloat16()}
        self._mask = torch.ones(1, context, dtype=torch.bool, device=device)

    def kernels(self, early: bool) -> dict[str, KernelSpec]:
        """Returns the five kernels of a twin, with the tiles of those that do not start early."""
        found = model_kernels(self._shape, context=self._context, device=self._name)
        dependent = model_kernels(self._shape, context=self._context, device=self._name, dependent=True)
        del found["exit score"], found["norm + head"]
        return {name: _with_tile(dependent[name], spec) for name, spec in found.items()} if early else found

    def run(self, early: bool) -> None:
        """Launches all twins; `hidden` becomes what the last one makes of it."""
        self.counters.fill_(self._context - 1)
        loaded = [load(spec, interpret=not self._on_gpu) for spec in self.kernels(early).values()]
        d = self._shape.head_dim
        hidden, qkv, heads, between, mlp = self._shared.values()
        for own, counter in zip(self._own, self.counters, strict=True):
            first, attend, out, gate_up, down = own.values()
            loaded[0](x=hidden, y=qkv, **first)
            loaded[1](
                **{"qkv": qkv.view(1, -1, d), "slot": counter, "mask": self._mask, **self._tables, **attend},
                out=heads.view(1, self._shape.heads, d),
            )
            loaded[2](x=heads, residual=hidden, y=between, **out)
            loaded[3](x=between, y=mlp, **gate_up)
            loaded[4](x=mlp, residual=between, y=hidden, **down)

    def captured(self, early: bool) -> torch.cuda.CUDAGraph:
        """Returns a graph of `run`, after a run that compiles, and that makes what stays."""
        self.run(early)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(early)
        return graph


def _with_tile(spec: KernelSpec, other: KernelSpec) -> KernelSpec:
    return dataclasses.replace(spec, tile=other.tile) if isinstance(other, LinearSpec) else spec


def _parameters(spec: KernelSpec, random: torch.Generator) -> dict[str, Tensor]:
    """Returns what a kernel of one twin has for itself: weights, or the caches, which it fills."""
    names = ("norm_weight", "bias", "qweight", "scale_zero", "q_norm", "k_norm", "k_cache", "v_cache")
    return {name: _random(name, b, spec, random) for name, b in spec.buffers().items() if name in names}


def _random(name: str, buffer: Buffer, spec: KernelSpec, random: torch.Generator) -> Tensor:
    device = random.device
    if name == "qweight":
        return torch.randint(-(2**31), 2**31 - 1, buffer.shape, generator=random, device=device, dtype=torch.int32)
    if name == "scale_zero":  # weights of the size that keeps a hidden state's, zeros of zero
        scale = torch.full((*buffer.shape, 2), 0.2 * spec.in_features**-0.5, device=device)
        scale[..., 1] = 0
        return scale.bfloat16().view(torch.int32).squeeze(-1)
    return torch.randn(buffer.shape, generator=random, device=device).bfloat16()


def same_bits(twins: Twins, graphs: list[torch.cuda.CUDAGraph]) -> bool:
    """Tells whether graphs give the same hidden states for inputs that change from replay to replay, and no NaN."""
    inputs = torch.randn(_COMPARED, *twins.hidden.shape, device=twins.hidden.device).bfloat16()
    results = []
    for graph in graphs:
        found = []
        for given in inputs:
            twins.hidden.copy_(given)
            graph.replay()
            found.append(twins.hidden.clone())
        results.append(torch.stack(found))
    return all(torch.equal(results[0], r) for r in results) and not results[0].isnan().any().item()


def measure(shape: ModelShape, context: int, rounds: int) -> dict:
    """Measures one model on the GPU; seconds of a twin of each round, and whether the results are the same."""
    twin = cost_of(*Twins(shape, 0, context, "cuda").kernels(early=False).values())
    count = min(shape.layers, _BEYOND_CACHE // twin.bytes + 2)
    twins = Twins(shape, count, context, "cuda")
    graphs = {early: twins.captured(early) for early in (False, True)}
    times: dict[bool, list[float]] = {early: [] for early in graphs}
    equal = same_bits(twins, list(graphs.values()))
    for _ in range(rounds):
        for early, graph in graphs.items():
            times[early].append(replay_seconds(graph, _REPLAYS) / count)
    found = {"model": shape.name, "context": context, "twins": count, "bytes": twin.bytes, "same_bits": equal}
    return found | {"plain_s": times[False], "early_s": times[True]}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 1 where no GPU here starts kernels early, or where a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, shape in MODELS.items() if not shape.experts]
    parser.add_argument(
        "--model", choices=names, nargs="+", default=["llama-3.1-8b"], help="whose shapes (%(default)s)"
    )
    parser.add_argument("--context", type=common.number(1), default=1024, help="slots of the cache (%(default)s)")
    parser.add_argument("--rounds", type=common.number(1), default=7, help="of replays (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, one by one")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() and starts_early(device_name(torch.cuda.current_device()))):
        print("this measures an NVIDIA GPU from sm_90 on and there is none here", file=sys.stderr)
        return 1
    rows: list[dict] = []
    for name in options.model:
        rows.append(measure(MODELS[name], options.context, options.rounds))
        if options.json:
            common.write_json(options.json, {"facts": gpu_facts.facts(), "rows": rows})
    table = [
        [row["model"], *(1e6 * statistics.median(row[way]) for way in ("plain_s", "early_s")), row["same_bits"]]
        for row in rows
    ]
    common.print_table(["", "us a twin", "early, us", "same bits"], table)
    return int(not all(row["same_bits"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
