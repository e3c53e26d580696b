"""Compiles the kernels of a model for GPUs that are not there, and prints what they use and what a token costs.

    python -m river_compile.kernels.tools.resources [--target sm_90 ...] [--model NAME] [--context 1024] [--json PATH]

Registers, spills and shared memory come from the compiled code, widths of loads and matrix instructions from its text.
Times are what the bytes alone cost at the given bandwidth: nothing here has run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from river_compile.kernels.triton.devices import DEVICES, Device
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import compile_for, source_file
from river_compile.kernels.triton.spec import ITEM_BYTES, KernelSpec

from .shapes import MODELS, ModelShape, block_kernels, model_kernels

_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")
_PTX_LOAD = re.compile(
    r"ld\.global(?:\.(?!v\d|b\d)[\w:]+)*(?:\.v(\d))?\.b(\d+)|cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)"
)
_AMD_LOAD = re.compile(r"(?:global|buffer)_load_(?:lds_)?(ubyte|sbyte|ushort|short_d16\w*|dword(?:x\d)?)")
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Usage:
    """What one launch uses on one target.

    Attributes:
        target, kernel, stage: where and what.
        registers: per thread (vector registers on AMD).
        spills: bytes of stack per thread, or spilled registers on AMD; 0 is the aim.
        shared: bytes of shared memory per program.
        occupancy: part of the processor's warps that can be resident.
        weight_load: bytes of the narrowest load of weights, None for kernels without.
        matrix_instructions: tensor-core (matrix-core) instructions in the code.
    """

    target: str
    kernel: str
    stage: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    weight_load: int | None
    matrix_instructions: int


def usages(spec: KernelSpec, label: str, target: str) -> Iterator[Usage]:
    """Compiles a spec for a GPU of `devices.DEVICES` and yields one usage per launch."""
    device = DEVICES[target]
    source = source_file(spec).read_text().splitlines()
    for stage, compiled in zip(spec.stages(), compile_for(spec, device.backend, device.arch), strict=True):
        nvidia = device.backend == "cuda"
        text = compiled.asm["ptx" if nvidia else "amdgcn"]
        registers, spills = _nvidia_registers(compiled.asm["cubin"]) if nvidia else _amd_registers(text)
        shared = compiled.metadata.shared
        yield Usage(
            target,
            label,
            stage.function,
            registers,
            spills,
            shared,
            _occupancy(device, registers, stage.num_warps, shared),
            weight_load_bytes(text, source, nvidia),
            len(_MATRIX.findall(text)),
        )


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
        if found and 0 < line <= len(source) and re.search(r"load\((q?weight)_ptr", source[line - 1]):
            width = _ptx_width(found) if nvidia else _AMD_BYTES.get(found[1], 2)
            narrowest = width if narrowest is None else min(narrowest, width)
    return narrowest


def _ptx_width(found: re.Match) -> int:
    return int(found[3], 0) if found[3] else int(found[1] or 1) * int(found[2]) // 8


def _nvidia_registers(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def _amd_registers(text: str) -> tuple[int, int]:
    return tuple(int(re.search(rf"\.vgpr_{name}:\s+(\d+)", text)[1]) for name in ("count", "spill_count"))


def _occupancy(device: Device, registers: int, warps: int, shared: int) -> float:
    allocated = math.ceil(max(registers, 1) / 8) * 8 * device.warp  # registers are given out by eights
    by_registers = device.registers // allocated // warps
    by_shared = device.shared // shared if shared else device.warps
    return min(by_registers, by_shared, device.warps // warps) * warps / device.warps


@dataclass(frozen=True)
class TokenCost:
    """What one token costs when every block runs as a twin.

    Attributes:
        model, context, group_size: of which model, with how many valid slots, in which groups.
        launches_per_block, launches: of one twin block, and of the whole token.
        bytes: what the kernels move, every buffer of every launch once.
        floor: weights, scales and zeros, head, and the cache read and written: what no kernel can avoid.
        microseconds: bytes at the bandwidth.
    """

    model: str
    context: int
    group_size: int
    launches_per_block: int
    launches: int
    bytes: int
    floor: int
    bandwidth: float

    @property
    def overhead(self) -> float:
        """Part of the bytes beyond the floor."""
        return self.bytes / self.floor - 1

    @property
    def microseconds(self) -> float:
        return self.bytes / self.bandwidth * 1e6


def token_cost(shape: ModelShape, *, context: int, group_size: int, device: str, bandwidth: float) -> TokenCost:
    """Adds up the kernels of one token: every block as a twin, then the head."""
    options = {"context": context, "group_size": group_size, "device": device}
    block = block_kernels(shape, **options)
    head = model_kernels(shape, **options)["norm + head"]
    launches = sum(len(spec.stages()) for spec in block.values())
    moved = shape.layers * sum(spec.cost().bytes for spec in block.values()) + head.cost().bytes
    floor = shape.layers * sum(_floor(spec) for spec in block.values()) + _floor(head)
    total = shape.layers * launches + len(head.stages())
    return TokenCost(shape.name, context, group_size, launches, total, moved, floor, bandwidth)


def _floor(spec: KernelSpec) -> int:
    if isinstance(spec, LinearSpec):
        return spec.weight_bytes
    if isinstance(spec, DecodeAttentionSpec):
        # All valid slots but the newest, which is written by the same token, are read from memory.
        return 2 * spec.batch * spec.kv_heads * spec.slots * spec.head_dim * ITEM_BYTES[spec.dtype]
    return 2 * spec.batch * spec.kv_heads * spec.head_dim * ITEM_BYTES[spec.dtype]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if a kernel spills."""
    options = _parser().parse_args(arguments)
    shape = MODELS[options.model]
    table: list[Usage] = []
    print(f"{options.model}, one row, context {options.context}, groups of {options.group_size}\n")
    print("| target | kernel | launch | registers | spills | shared | occupancy | weight load | matrix instructions |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for target in options.target:
        kernels = model_kernels(shape, context=options.context, group_size=options.group_size, device=target)
        for label, spec in kernels.items():
            for usage in usages(spec, label, target):
                table.append(usage)
                load = f"{usage.weight_load} B" if usage.weight_load else ""
                cells = (target, label.replace("|", "\\|"), usage.stage, usage.registers, usage.spills, usage.shared)
                print("|", *(f"{cell} |" for cell in cells), f"{usage.occupancy:.0%} | {load} |", end=" ")
                print(usage.matrix_instructions, "|", flush=True)
    costs = []
    print("\n| target | launches per block | per token | MB per token | floor MB | above | us per token |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for target in options.target:
        bandwidth = options.bandwidth * 1e9 if options.bandwidth else DEVICES[target].bandwidth
        cost = token_cost(
            shape, context=options.context, group_size=options.group_size, device=target, bandwidth=bandwidth
        )
        costs.append({"target": target, **asdict(cost)})
        megabytes = f"{cost.bytes / 1e6:.1f} | {cost.floor / 1e6:.1f} | {cost.overhead:.1%}"
        print(f"| {target} | {cost.launches_per_block} | {cost.launches} | {megabytes} | {cost.microseconds:.0f} |")
    if options.json:
        Path(options.json).write_text(json.dumps({"kernels": [asdict(u) for u in table], "tokens": costs}, indent=1))
    return int(any(usage.spills for usage in table))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m river_compile.kernels.tools.resources", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", nargs="+", choices=DEVICES, default=list(DEVICES), help="GPUs to compile for")
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b", help="whose shapes (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="valid slots of the cache (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument("--bandwidth", type=float, help="GB/s for the times; each target's data sheet if not given")
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
