"""Compiles the kernels of a model for GPUs that are not there, and prints what they use and what a token costs.

    python -m tools.kernels.resources [--target sm_90 ...] [--model NAME] [--context 1024] [--json PATH]
        [--backbone dense|bf12 [--rows 8]]

Registers, spills and shared memory come from the compiled code, widths of loads and matrix instructions from its text.
For NVIDIA the machine code of products with packed weights is counted: instructions that a thread executes for each of
its weights (see `machine_code`). Times are what the bytes alone cost at the given bandwidth: nothing here has run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from river_compile.kernels.triton.devices import DEVICES, Device
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import compile_for, source_file
from river_compile.kernels.triton.spec import KernelSpec

from .machine_code import counted, cuobjdump
from .shapes import MODELS, ModelShape, TokenCost, backbone_kernels, cost_of, model_kernels

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
    instructions: float | None  # that a thread executes per packed weight; None where they are not counted
    loads_first: bool | None  # whether no load of weights waits behind the first use of some; None as above


def usages(spec: KernelSpec, label: str, target: str) -> Iterator[Usage]:
    """Compiles a spec for a GPU of `devices.DEVICES` and yields one usage per launch."""
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
        if nvidia and isinstance(spec, LinearSpec) and spec.weights != "dense" and load:
            code = counted(cuobjdump(compiled.asm["cubin"], "-sass"), spec)
        counts = (code.per_weight, code.loads_first) if code else (None, None)
        yield Usage(target, label, stage.function, registers, spills, shared, occupancy, load, matrix, *counts)


def weight_load_bytes(text: str, source: list[str], nvidia: bool) -> int | None:
    """Returns the bytes of the narrowest load that comes from a source line reading weights; None if there is none.

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


def token_cost(shape: ModelShape, kernels: dict[str, KernelSpec]) -> tuple[TokenCost, TokenCost]:
    """Returns the costs of one block as a twin and of a whole token: every block as a twin, then the head."""
    block = cost_of(*(spec for label, spec in kernels.items() if label not in ("exit score", "norm + head")))
    return block, shape.layers * block + cost_of(kernels["norm + head"])


def token_floor(shape: ModelShape, kernels: dict[str, KernelSpec], context: int) -> int:
    """Returns the bytes that no kernel can avoid: weights, scales and zeros, head, and the cache read and written."""
    linears = {label: spec for label, spec in kernels.items() if isinstance(spec, LinearSpec)}
    weights = {label: sum(b.bytes for b in spec.weight_buffers.values()) for label, spec in linears.items()}
    for label, spec in linears.items():
        if spec.experts:
            weights[label] = weights[label] * shape.chosen // shape.experts
    head = weights.pop("norm + head")
    # The newest slot is written, and all others are read, keys and values in 16 bits.
    cache = 2 * 2 * shape.kv_heads * shape.head_dim * context
    return shape.layers * (sum(weights.values()) + cache) + head


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if a kernel spills."""
    options = _parser().parse_args(arguments)
    shape = MODELS[options.model]
    sizes = {"context": options.context, "group_size": options.group_size}
    table: list[Usage] = []
    costs = []
    print(f"{options.model}, one row, context {options.context}, groups of {options.group_size}\n")
    print(
        "| target | kernel | launch | registers | spills | shared | occupancy | weight load | matrix | per weight | |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for target in options.target:
        kernels = model_kernels(shape, device=target, **sizes)
        if options.backbone:
            kernels |= backbone_kernels(shape, options.backbone, rows=options.rows, device=target)
        for label, spec in kernels.items():
            for usage in usages(spec, label, target):
                table.append(usage)
                load = f"{usage.weight_load} B" if usage.weight_load else ""
                cells = (target, label.replace("|", "\\|"), usage.stage, usage.registers, usage.spills, usage.shared)
                counts = "" if usage.instructions is None else f"{usage.instructions:.2f}"
                late = "loads behind uses" if usage.loads_first is False else ""
                _print_row(*cells, f"{usage.occupancy:.0%}", load, usage.matrix_instructions, counts, late)
    print("\n| target | launches per block | per token | MB per token | floor MB | above | us per token |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for target in options.target:
        bandwidth = options.bandwidth * 1e9 if options.bandwidth else DEVICES[target].bandwidth
        kernels = model_kernels(shape, device=target, **sizes)
        block, token = token_cost(shape, kernels)
        floor = token_floor(shape, kernels, options.context)
        row = {"target": target, "model": shape.name, **sizes, "launches_per_block": block.launches}
        costs.append({**row, **asdict(token), "floor": floor, "bandwidth": bandwidth})
        bytes_ = (f"{token.bytes / 1e6:.1f}", f"{floor / 1e6:.1f}", f"{token.bytes / floor - 1:.1%}")
        _print_row(target, block.launches, token.launches, *bytes_, f"{token.seconds(bandwidth) * 1e6:.0f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"kernels": [asdict(u) for u in table], "tokens": costs}, indent=1))
    return int(any(usage.spills for usage in table))


def _print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=DEVICES, default=list(DEVICES), help="GPUs to compile for")
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b", help="whose shapes (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="valid slots of the cache (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument("--backbone", choices=("dense", "bf12"), help="its matmuls too, with such weights")
    parser.add_argument("--rows", type=int, default=1, help="of the backbone's matmuls (default %(default)s)")
    parser.add_argument("--bandwidth", type=float, help="GB/s for the times; each target's data sheet if not given")
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
