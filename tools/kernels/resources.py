"""Compiles the kernels of models for GPUs that are not there, and prints what they use, what bounds each launch, and
what a token costs.

    python -m tools.kernels.resources [--target sm_90 ...] [--model NAME ...] [--rows 1 4 8 16]
        [--context 1024 8192 32768] [--backbone dense bf12] [--json PATH]

Registers, spills and shared memory come from the compiled code, widths of loads and matrix instructions from its text.
The machine code of products is counted: instructions that a thread executes for each of its weights (see
`machine_code`). What bounds a launch says the kernels' cost model (`cost_model.Estimate`), with these registers and
instructions in its place: nothing here has run. Columns of its part:

    KB ahead    bytes of weights (of keys and values) on their way to one processor before the first is used
    waves       of programs; the digits behind the point are how full the last one is
    x/W         bytes of activations that all programs read of the shared cache, for each byte of weights from memory
    us, bytes   the model's time, and the part of it that the bytes alone take at the data sheet's bandwidth
    bound       bytes; in flight (too few on their way); tail (processors idle in the last wave); cache (the shared
                one); instructions; latency (launch and steps that wait for one another are most of the time)
    share       of the token that the kernel belongs to: leaving at depth 0 for twins, never leaving for others
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from river_compile.kernels.triton.cache import DecodeAttentionSpec
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import compile_for, source_file
from river_compile.kernels.triton.spec import KernelSpec

from .cost_model import Compiled, bytes_ahead, shared_bytes
from .devices import DEVICES, Device
from .machine_code import counted, counted_amd, cuobjdump, thread_weights
from .shapes import (
    MODELS,
    ModelShape,
    TokenCost,
    backbone_kernels,
    cost_of,
    estimate_of,
    model_kernels,
    verifying_kernels,
)

_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")
_PTX_LOAD = re.compile(
    r"ld\.global(?:\.(?!v\d|b\d)[\w:]+)*(?:\.v(\d))?\.b(\d+)|cp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)"
)
_AMD_LOAD = re.compile(r"(?:global|buffer)_load_(?:lds_)?(ubyte|sbyte|ushort|short_d16\w*|dword(?:x\d)?)")
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Usage:
    """What one launch uses on one target."""

    target: str
    kernel: str
    stage: str
    registers: int  # per thread (vector registers on AMD)
    spills: int  # bytes of stack per thread, or spilled registers on AMD; 0 is the aim
    shared: int  # bytes of shared memory per program
    occupancy: float  # part of the processor's warps that can be resident
    weight_load: int | None  # bytes of the narrowest load of weights, None for kernels without
    matrix_instructions: int  # of tensor cores (matrix cores) in the code
    instructions: float | None  # that a thread executes per weight; None where they are not counted
    loads_first: bool | None  # whether no load of weights waits behind the first use of some; None as above
    model: str = ""
    rows: int = 1
    context: int = 0
    ahead: float | None = None  # bytes on their way to a processor; this and what follows None behind the first launch
    shared_reads: float | None = None  # bytes of activations that programs read, by the weights' bytes
    waves: float | None = None
    seconds: float | None = None
    of_bytes: float | None = None  # the part of the seconds that the bytes alone take
    bound: str | None = None
    share: float | None = None


def usages(spec: KernelSpec, label: str, target: str) -> Iterator[Usage]:
    """Compile a spec for a GPU of `devices.DEVICES` and yield one usage per launch."""
    device = DEVICES[target]
    source = source_file(spec).read_text().splitlines()
    for stage, compiled in zip(spec.stages(), compile_for(spec, device.backend, device.arch), strict=True):
        nvidia = device.backend == "cuda"
        text = compiled.asm["ptx" if nvidia else "amdgcn"]
        report = cuobjdump(compiled.asm["cubin"], "-res-usage") if nvidia else text
        names = (r"REG:", r"STACK:") if nvidia else (r"\.vgpr_count:\s+", r"\.vgpr_spill_count:\s+")
        registers, spills = (_number(name, report) for name in names)
        shared = compiled.metadata.shared
        occupancy = _occupancy(device, registers, stage.num_warps, shared)
        load, matrix = weight_load_bytes(text, source, nvidia), len(_MATRIX.findall(text))
        code = None
        product = isinstance(spec, LinearSpec) and not spec.experts and not stage.function.endswith("_reduce")
        if nvidia and product and load and (spec.weights, spec.dtype) != ("dense", "float32"):
            code = counted(cuobjdump(compiled.asm["cubin"], "-sass"), spec)
        counts = (code.per_weight, code.loads_first) if code else (None, None)
        if not nvidia and product:
            counts = (counted_amd(text, spec), None)
        yield Usage(target, label, stage.function, registers, spills, shared, occupancy, load, matrix, *counts)


def bounded(usage: Usage, spec: KernelSpec, rows: int = 1) -> Usage:
    """Return the usage of a kernel's first launch with what bounds it, by the cost model and what was compiled.

    `rows` is for a matmul that leaves their number open.
    """
    device = DEVICES[usage.target]
    resident = max(1, round(usage.occupancy * device.warps / spec.stages()[0].num_warps))
    executed = None
    if usage.instructions is not None and isinstance(spec, LinearSpec):
        executed = usage.instructions * thread_weights(spec, device.warp)
    rows = rows if isinstance(spec, LinearSpec) else 1
    estimate = estimate_of(spec, device, Compiled(resident, executed), rows)
    programs = min(estimate.waves, 1.0) * resident
    ahead = reads = None
    if isinstance(spec, LinearSpec):
        ahead = programs * bytes_ahead(spec)
        reads = shared_bytes(spec, rows) / sum(buffer.bytes for buffer in spec.weight_buffers.values())
    elif isinstance(spec, DecodeAttentionSpec):
        ahead = programs * 2 * spec.block * spec.cache.bytes / (spec.cache.shape[0] * spec.kv_heads * spec.slots)
    time = {"waves": estimate.waves, "seconds": estimate.total, "of_bytes": estimate.bytes / estimate.total}
    return replace(usage, ahead=ahead, shared_reads=reads, bound=estimate.bound, **time)


def weight_load_bytes(text: str, source: list[str], nvidia: bool) -> int | None:
    """Return the bytes of the narrowest load that comes from a source line reading weights; None if there is none.

    The compiled text names the source line of every instruction (`.loc file line column`). Inside of inline assembly,
    which is what Triton's loads for NVIDIA are, those numbers count on from the line that the assembly stands for.
    """
    line, inline, narrowest = 0, False, None
    for row in text.splitlines():
        if "inline asm" in row:
            inline = "begin" in row
        location = re.match(r"\s*\.loc\s+\d+\s+(\d+)", row)
        if location and not inline:
            line = int(location[1])
        found = (_PTX_LOAD if nvidia else _AMD_LOAD).search(row)
        if found and 0 < line <= len(source) and re.search(r"load\((q?weight|half|units)_ptr", source[line - 1]):
            if not nvidia:
                width = _AMD_BYTES.get(found[1], 2)
            elif found[3]:  # an asynchronous copy names its bytes
                width = int(found[3], 0)
            else:
                width = int(found[1] or 1) * int(found[2]) // 8
            narrowest = width if narrowest is None else min(narrowest, width)
    return narrowest


def _number(name: str, report: str) -> int:
    found = re.search(name + r"(\d+)", report)
    if found is None:
        raise ValueError(f"the compiler's report has nothing like {name}")
    return int(found[1])


def _occupancy(device: Device, registers: int, warps: int, shared: int) -> float:
    allocated = math.ceil(max(registers, 1) / 8) * 8 * device.warp  # registers are given out by eights
    by_registers = device.registers // allocated // warps
    by_shared = device.shared // shared if shared else device.warps
    return min(by_registers, by_shared, device.warps // warps) * warps / device.warps


def token_cost(shape: ModelShape, kernels: dict[str, KernelSpec], rows: int = 1) -> tuple[TokenCost, TokenCost]:
    """Return the costs of one block, and of a token of so many sequences that runs all blocks so and then the head."""
    matmuls = [label for label, spec in kernels.items() if isinstance(spec, LinearSpec)]
    block = TokenCost(0, 0)
    for label, spec in kernels.items():
        if label not in ("exit score", "norm + head"):
            block += cost_of(spec, rows=rows if label in matmuls else 1)
    return block, shape.layers * block + cost_of(kernels["norm + head"], rows=rows)


def token_floor(shape: ModelShape, kernels: dict[str, KernelSpec], context: int, rows: int = 1) -> int:
    """Return the bytes that no kernel can avoid: weights, scales and zeros, head, and the cache read and written."""
    linears = {label: spec for label, spec in kernels.items() if isinstance(spec, LinearSpec)}
    weights = {label: sum(b.bytes for b in spec.weight_buffers.values()) for label, spec in linears.items()}
    for label, spec in linears.items():
        if spec.experts:
            weights[label] = weights[label] * shape.chosen // shape.experts
    head = weights.pop("norm + head")
    # The newest slot is written, and all others are read, keys and values in 16 bits.
    cache = 2 * 2 * shape.kv_heads * shape.head_dim * context * rows
    return shape.layers * (sum(weights.values()) + cache) + head


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if a kernel spills."""
    options = _parser().parse_args(arguments)
    table: list[Usage] = []
    tokens = []
    print(f"Groups of {options.group_size}. Nothing here has run on a GPU.\n")
    _print_head(
        *("model", "rows", "slots", "target", "kernel", "launch", "registers", "spills", "shared", "occupancy"),
        *("weight load", "matrix", "per weight", "KB ahead", "waves", "x/W", "us", "bytes", "bound", "share"),
    )
    compiled: dict[tuple[str, KernelSpec], list[Usage]] = {}
    for name, rows, context, target in itertools.product(options.model, options.rows, options.context, options.target):
        shape, sizes = MODELS[name], {"rows": rows, "context": context}
        twins = model_kernels(shape, device=target, group_size=options.group_size, **sizes)
        attention = twins["rope + kv write + attention"]
        verifying = verifying_kernels(attention) if options.backbone else {}
        kernels = {**twins, "kv write alone": attention.fill, **verifying}
        groups = {"twins": [label for label in twins if label != "exit score"]}
        for weights in options.backbone:
            matmuls = backbone_kernels(shape, weights, rows=rows, device=target)
            found = {f"{weights} {label}": spec for label, spec in matmuls.items()}
            kernels |= found
            groups[weights] = [*verifying, *found]
        usage_of: dict[str, list[Usage]] = {}
        for label, spec in kernels.items():
            if (target, spec) not in compiled:
                compiled[target, spec] = list(usages(spec, label, target))
            first, *rest = (replace(found, kernel=label, model=name, **sizes) for found in compiled[target, spec])
            usage_of[label] = [bounded(first, spec, rows), *rest]
        for group, labels in reversed(groups.items()):  # (attention's share is that of a token that exits immediately)
            part = {label: usage_of[label][0] for label in labels}
            seconds = {label: shape.layers ** (not _is_head(label)) * usage.seconds for label, usage in part.items()}
            for label, time in seconds.items():
                usage_of[label][0] = part[label] = replace(part[label], share=time / sum(seconds.values()))
            block, token = token_cost(
                shape, {label.removeprefix(f"{group} "): kernels[label] for label in labels}, rows
            )
            floor = token_floor(shape, twins, context, rows) if group == "twins" else None
            bandwidth = options.bandwidth * 1e9 if options.bandwidth else DEVICES[target].bandwidth
            others = [(usage.kernel, usage.bound, usage.share) for usage in part.values() if usage.bound != "bytes"]
            row = {"model": name, **sizes, "target": target, "blocks": group, "launches_per_block": block.launches}
            row |= {**asdict(token), "floor": floor, "bandwidth": bandwidth, "modelled": sum(seconds.values())}
            tokens.append({**row, "others": others})
        for usage in itertools.chain(*usage_of.values()):
            table.append(usage)
            _print_usage(usage)
    print()
    _print_head(
        *("model", "rows", "slots", "target", "blocks", "launches per block", "per token", "MB per token", "floor MB"),
        *("above", "us per token", "modelled us", "bound by bytes", "by something else"),
    )
    for row in tokens:
        cells = [row[k] for k in ("model", "rows", "context", "target", "blocks", "launches_per_block", "launches")]
        floor = row["floor"] and (f"{row['floor'] / 1e6:.1f}", f"{row['bytes'] / row['floor'] - 1:.1%}")
        cells += [f"{row['bytes'] / 1e6:.1f}", *(floor or ("", ""))]
        cells += [f"{row['bytes'] / row['bandwidth'] * 1e6:.0f}", f"{row['modelled'] * 1e6:.0f}"]
        others = sorted(row["others"], key=lambda other: -other[2])
        cells += [f"{1 - sum(share for _, _, share in others):.0%}"]
        _print_row(*cells, ", ".join(f"{_cell(label)} {share:.0%} ({bound})" for label, bound, share in others))
    if options.json:
        Path(options.json).write_text(json.dumps({"kernels": [asdict(u) for u in table], "tokens": tokens}, indent=1))
    return int(any(usage.spills for usage in table))


def _is_head(label: str) -> bool:
    return label.endswith("norm + head")


def _print_usage(usage: Usage) -> None:
    late = "; loads behind uses" if usage.loads_first is False else ""
    _print_row(
        *(usage.model, usage.rows, usage.context, usage.target, _cell(usage.kernel), usage.stage),
        *(usage.registers, usage.spills, usage.shared, f"{usage.occupancy:.0%}"),
        *(f"{usage.weight_load} B" if usage.weight_load else "", usage.matrix_instructions),
        *(_shown(usage.instructions, ".2f"), _shown(usage.ahead and usage.ahead / 1024, ".0f")),
        *(_shown(usage.waves, ".2f"), _shown(usage.shared_reads, ".2f")),
        *(_shown(usage.seconds and usage.seconds * 1e6, ".1f"), _shown(usage.of_bytes, ".0%")),
        *((usage.bound or "") + late, _shown(usage.share, ".1%")),
    )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cell(label: str) -> str:
    return label.replace("|", "\\|")


def _print_head(*cells: str) -> None:
    _print_row(*cells)
    _print_row(*["---"] * len(cells))


def _print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=DEVICES, default=list(DEVICES), help="GPUs to compile for")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama-3.2-1b"], help="whose shapes %(default)s")
    parser.add_argument(
        "--context", nargs="+", type=int, default=[1024], help="slots of the cache (default %(default)s)"
    )
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument(
        "--backbone", nargs="+", choices=("dense", "bf12"), default=[], help="its matmuls too, so packed"
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1], help="of activations, 1 to 16 (default %(default)s)"
    )
    parser.add_argument("--bandwidth", type=float, help="GB/s for the times; each target's data sheet if not given")
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
