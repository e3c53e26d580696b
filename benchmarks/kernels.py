"""Times every kernel of a model's decode step on the GPU at hand, or 4-bit products on the CPU.

    python -m benchmarks.kernels [--model llama-3.1-8b] [--rows 1] [--context 1024] [--group-size 64] [--json PATH]
    python -m benchmarks.kernels --device cpu [--threads 1 2] [--repeats 60] [--group-size 64] [--json PATH]

On a CPU, see `benchmarks.cpu_kernels`. Columns on a GPU, for each kernel:

- microseconds: measured, expected by the cost model, and "by bytes", at the measured bandwidth of copies
- the bandwidth that was reached, also as a part of the copies'
- the speed against torch, in bfloat16 (`F.linear`, `scaled_dot_product_attention`) and in 4 bits
  (`_weight_int4pack_mm`), and against GemLite if it is installed

All timings come from captured graphs over weights beyond the cache. Each row is printed and written as soon as it is
there; a kernel that fails is named, and the next one is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks import common, cpu_kernels, gpu_facts
from benchmarks.int4_baseline import fits, packed_for_cuda
from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.kernels.triton.cache import DecodeAttentionSpec
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import device_name, load
from river_compile.kernels.triton.spec import Buffer, KernelSpec
from tools.kernels.cost_model import rows_of
from tools.kernels.cost_model import seconds as modelled
from tools.kernels.devices import known
from tools.kernels.shapes import MODELS, model_kernels
from tools.kernels.tune import copies_beyond_cache, first_line, measure_on_gpu, time_calls


@dataclass(frozen=True)
class Timing:
    """One row of the table: seconds of our kernel, and of others and by the cost model, None where it has none."""

    kernel: str
    shape: str
    seconds: float
    bytes: int
    torch_seconds: float | None = None
    gemlite_seconds: float | None = None
    int4_seconds: float | None = None
    expected_seconds: float | None = None


def copy_bandwidth(size: int = 2**30) -> float:
    """Return bytes per second of a device-to-device copy, counting the read and the write."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / time_calls([lambda: target.copy_(source)] * 3)


def torch_linear_seconds(spec: LinearSpec) -> float | None:
    """Time `F.linear` in bfloat16 with all rows of the spec's weights, without norm and epilogue; None for experts."""
    if spec.experts:
        return None
    x = torch.randn(rows_of(spec), spec.in_features, device="cuda", dtype=torch.bfloat16)
    shape = (spec.out_features * len(spec.streams), spec.in_features)
    copies = max(1, copies_beyond_cache(spec) // 3)
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return time_calls([functools.partial(F.linear, x, weight) for weight in weights])


def gemlite_seconds(spec: LinearSpec) -> float | None:
    """Time GemLite in float16 on the spec's 4-bit shape; None where it is not installed or the weights are dense."""
    if spec.weights != "w4" or spec.experts or importlib.util.find_spec("gemlite") is None:
        return None
    from gemlite.core import DType, GemLiteLinear

    n, k, group = spec.out_features * len(spec.streams), spec.in_features, spec.group_size
    layers = []
    for _ in range(copies_beyond_cache(spec)):
        layer = GemLiteLinear(4, group, k, n, DType.FP16, DType.FP16)
        q = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        scale = torch.rand(n * k // group, 1, device="cuda", dtype=torch.float16)
        layer.pack(q, scale, scale * 8, None)
        layers.append(layer)
    x = torch.randn(rows_of(spec), k, device="cuda", dtype=torch.float16)
    return time_calls([functools.partial(layer, x) for layer in layers])


def int4_seconds(spec: LinearSpec) -> float | None:
    """Time torch's own 4-bit product, with all rows of the spec's weights; None where it does not take the shape."""
    n, k, group = spec.out_features * len(spec.streams), spec.in_features, spec.group_size
    if spec.weights != "w4" or spec.experts or not fits(n, k):
        return None
    grid = QuantizedWeight(
        torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8),
        *(torch.rand(n, k // group, device="cuda") for _ in range(2)),
        group,
    )
    weight, table = packed_for_cuda(grid)
    copies = [(weight.clone(), table.clone()) for _ in range(copies_beyond_cache(spec))]
    x = torch.randn(rows_of(spec), k, device="cuda", dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm
    return time_calls([functools.partial(product, x, w, group, t) for w, t in copies])


def attention_timing(label: str, spec: DecodeAttentionSpec) -> Timing:
    """Time the attention kernel, with what it does before, and SDPA alone, over a full cache."""
    copies = copies_beyond_cache(spec)
    shape = (spec.batch, spec.kv_heads, spec.slots, spec.head_dim)
    caches = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(copies)]
    spec = dataclasses.replace(spec, advance=False)  # (a counter would run out of the cache)
    others = {name: _some(b) for name, b in spec.buffers().items() if not (b.workspace or b.strided)}
    kernel = load(spec, interpret=False)
    ours = [functools.partial(kernel, k_cache=k, v_cache=v, **others) for k, v in caches]
    q = torch.randn(spec.batch, spec.heads, 1, spec.head_dim, device="cuda", dtype=torch.bfloat16)
    theirs = [functools.partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True) for k, v in caches]
    return Timing(label, f"{shape}", time_calls(ours), spec.cost().bytes, time_calls(theirs))


def _some(buffer: Buffer) -> torch.Tensor:
    """Make a tensor for a buffer: random numbers, a mask of which all is True, slot 1."""
    dtype = getattr(torch, buffer.dtype)
    make = torch.randn if dtype.is_floating_point else torch.ones
    return make(buffer.shape, device="cuda", dtype=dtype)


def timing(label: str, spec: KernelSpec) -> Timing | None:
    """Time one kernel; None for those whose few bytes make a bandwidth meaningless."""
    if isinstance(spec, DecodeAttentionSpec):
        return attention_timing(label, spec)
    if not isinstance(spec, LinearSpec):
        return None
    shape = f"{spec.out_features * len(spec.streams)} x {spec.in_features}"
    moved = spec.cost(rows_of(spec)).bytes
    return Timing(
        label,
        shape,
        measure_on_gpu(spec),
        moved,
        torch_linear_seconds(spec),
        gemlite_seconds(spec),
        int4_seconds(spec),
        modelled(spec, known(device_name(torch.cuda.current_device()))),
    )


def timings(kernels: Mapping[str, KernelSpec]) -> Iterator[Timing]:
    """Time kernels one by one; names those that fail."""
    for label, spec in kernels.items():
        try:
            found = timing(label, spec)
        except Exception as error:  # of compiler or driver: it says more than a missing row
            print(f"{label}: {first_line(error)}", file=sys.stderr)
            continue
        if found is not None:
            yield found


def print_head() -> None:
    """Print the table's head."""
    print("| kernel | shape | us | by bytes | expected | GB/s | of copy | x torch bf16 | x torch int4 | x GemLite |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")


def print_row(t: Timing, copy: float) -> None:
    """Print one row; `copy` is the bandwidth of copies in bytes per second."""
    others = (t.torch_seconds, t.int4_seconds, t.gemlite_seconds)
    against = [f"{other / t.seconds:.2f}" if other else "" for other in others]
    rate, expected = t.bytes / t.seconds, f"{t.expected_seconds * 1e6:.1f}" if t.expected_seconds else ""
    cells = [t.kernel.replace("|", "\\|"), t.shape, f"{t.seconds * 1e6:.1f}", f"{t.bytes / copy * 1e6:.1f}", expected]
    print("|", " | ".join([*cells, f"{rate / 1e9:.0f}", f"{rate / copy:.0%}", *against]), "|", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b", help="whose shapes (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="valid slots of the cache (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="on a CPU (default 1 2)")
    parser.add_argument("--repeats", type=int, default=60, help="of each product on a CPU (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        found = cpu_kernels.measure(options.group_size, options.threads, options.repeats)
        cpu_kernels.print_table(found)
        if options.json:
            common.write_json(options.json, {"group_size": options.group_size, "kernels": [asdict(t) for t in found]})
        return 0
    if not torch.cuda.is_available():
        print("this benchmark measures a GPU and there is none here", file=sys.stderr)
        return 1
    device = known(device_name(torch.cuda.current_device())).name
    sizes = {"rows": options.rows, "context": options.context, "group_size": options.group_size}
    kernels = model_kernels(MODELS[options.model], device=device, **sizes)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {copy / 1e9:.0f} GB/s; {options.model}, {sizes}\n")
    figures = {"facts": gpu_facts.facts(), "copy_bandwidth": copy, "model": options.model, **sizes}
    found: list[Timing] = []
    print_head()
    for row in timings(kernels):
        found.append(row)
        print_row(row, copy)
        if options.json:
            rows = {"kernels": [asdict(t) for t in found], "clocks": gpu_facts.clocks()}
            common.write_json(options.json, {**figures, **rows})
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
