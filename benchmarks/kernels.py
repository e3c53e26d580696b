"""Times every kernel of a model's decode step on the GPU at hand, or matmuls of 4-bit weights on the CPU.

    python -m benchmarks.kernels [--model llama-3.1-8b] [--rows 1] [--context 1024] [--group-size 64] [--json PATH]
    python -m benchmarks.kernels --device cpu [--threads 1 2] [--repeats 60] [--group-size 64] [--json PATH]

On a GPU: microseconds as measured, "by bytes" at the bandwidth of copies, and by the cost model; and the speed against
torch in bfloat16. Timings come from captured graphs over weights beyond the cache. A kernel that fails is named, and
the next one is timed; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks import common, cpu_kernels
from river_compile.kernels.triton.cache import DecodeAttentionSpec
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import device_name, load
from river_compile.kernels.triton.spec import Buffer, KernelSpec
from tools.kernels.cost_model import rows_of
from tools.kernels.cost_model import seconds as modeled
from tools.kernels.devices import known
from tools.kernels.shapes import MODELS, model_kernels
from tools.kernels.tune import copies_beyond_cache, first_line, measure_on_gpu, time_calls


@dataclass(frozen=True)
class Timing:
    """One row of the table: seconds of our kernel, of torch's and by the cost model, None where there are none."""

    kernel: str
    shape: str
    seconds: float
    bytes: int
    torch_seconds: float | None = None
    expected_seconds: float | None = None


def copy_bandwidth(size: int = 2**28) -> float:
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
        modeled(spec, known(device_name(torch.cuda.current_device()))),
    )


def timings(kernels: Mapping[str, KernelSpec], failed: list[str]) -> Iterator[Timing]:
    """Time kernels one by one; name those that fail."""
    for label, spec in kernels.items():
        try:
            found = timing(label, spec)
        except Exception as error:  # of compiler or driver: it says more than a missing row
            print(f"{label}: {first_line(error)}", file=sys.stderr)
            failed.append(label)
            continue
        if found is not None:
            yield found


def print_row(t: Timing, copy: float) -> None:
    """Print one row; `copy` is the bandwidth of copies in bytes per second."""
    against = f"{t.torch_seconds / t.seconds:.2f}" if t.torch_seconds else ""
    rate, expected = t.bytes / t.seconds, f"{t.expected_seconds * 1e6:.1f}" if t.expected_seconds else ""
    cells = [t.kernel.replace("|", "\\|"), t.shape, f"{t.seconds * 1e6:.1f}", f"{t.bytes / copy * 1e6:.1f}", expected]
    print("|", " | ".join([*cells, f"{rate / 1e9:.0f}", f"{rate / copy:.0%}", against]), "|", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where there is no GPU, or a kernel failed."""
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
        cpu_kernels.print_attention(options.threads, options.repeats)
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
    figures = {"facts": common.gpu_facts(), "copy_bandwidth": copy, "model": options.model, **sizes}
    found: list[Timing] = []
    failed: list[str] = []
    print("| kernel | shape | us | by bytes | expected | GB/s | of copy | x torch |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in timings(kernels, failed):
        found.append(row)
        print_row(row, copy)
        if options.json:
            common.write_json(options.json, {**figures, "kernels": [asdict(t) for t in found]})
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
