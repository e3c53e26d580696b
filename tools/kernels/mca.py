"""Cycles and bytes a weight of the ARM kernels' inner loops on paper, by llvm-mca: ``python -m tools.kernels.mca``.

Compiles the kernels for ARM (``aarch64-linux-gnu-g++``), takes each innermost loop from the machine code and gives it
to llvm-mca, together with llama.cpp's loop for repacked Q4_0, written from its description. Not handled: caches, the
memory's speed, and what stands between two loops (scales of a group).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from river_compile.kernels.native.build import compiler_of, isas_of, kernels_library
from river_compile.kernels.native.machine import ARM

COMPILER, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
CPUS = ("neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2", "apple-m1", "cortex-a55")

# One step of ggml's 4x4 repacked Q4_0 GEMV: 32 input features of four interleaved columns. Nibbles are signed in the
# upper halves of bytes (weights are stored xor 8). Each column has a float16 scale, and so has the row.
LLAMA_CPP = """
#include <arm_neon.h>
extern "C" void q4_0_4x4(const uint8_t* w, const int8_t* x, const uint16_t* x_scale, float* y, long blocks) {
  float32x4_t sum = vld1q_f32(y);
  for (long b = 0; b < blocks; ++b, w += 72, x += 32) {
    const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)w)));
    const float32x4_t of_x = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x_scale[b])));
    const int8x16x4_t q = vld1q_s8_x4((const int8_t*)w + 8);
    const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
    int32x4_t dots = vdupq_n_s32(0);
    const int8x16_t mask = vdupq_n_s8((int8_t)0xf0);
#define STEP(i)                                                  \\
    dots = vdotq_laneq_s32(dots, vshlq_n_s8(q.val[i], 4), low, i); \\
    dots = vdotq_laneq_s32(dots, vandq_s8(q.val[i], mask), high, i);
    STEP(0) STEP(1) STEP(2) STEP(3)
    sum = vfmaq_f32(sum, vcvtq_n_f32_s32(dots, 4), vmulq_f32(scale, of_x));
  }
  vst1q_f32(y, sum);
}
"""


@dataclass(frozen=True)
class Loop:
    """An inner loop: where it is, and what one turn of it computes.

    Attributes:
        title: for people.
        isa: of the kernels' library, "" for llama.cpp's loop.
        function: part of its name in the machine code.
        instruction: one that the loop has.
        weights: that one turn multiplies with each row; `rows` of activations.
        weight_bytes: of these weights, with the scales of groups of 64 (llama.cpp: 32).
    """

    title: str
    isa: str
    function: str
    instruction: str
    weights: int
    rows: int
    weight_bytes: int


LOOPS = (
    Loop("4 bits, sdot, 1 row", "neon_dotprod", "microkernel_int4ILi1E", "sdot", 256, 1, 144),
    Loop("4 bits, sdot, 4 rows", "neon_dotprod", "microkernel_int4ILi4E", "sdot", 256, 4, 144),
    Loop("4 bits, smmla, 2 rows", "neon_i8mm", "microkernel_int4ILi2E", "smmla", 128, 2, 72),
    Loop("4 bits, smmla, 4 rows", "neon_i8mm", "microkernel_int4ILi4E", "smmla", 128, 4, 72),
    Loop("4 bits, NEON alone, 1 row", "neon", "microkernel_int4ILi1E", "smlal", 128, 1, 72),
    Loop("llama.cpp Q4_0 4x4, 1 row", "", "q4_0_4x4", "sdot", 128, 1, 72),
    Loop("bfloat16, bfdot, 1 row", "neon_i8mm", "dots_of_pairsILi1ELi4E", "bfdot", 128, 1, 256),
)


def innermost_loops(listing: str, function: str, instruction: str) -> list[list[str]]:
    """Return the instructions of each loop without a loop in it that has `instruction`, shortest first."""
    found = []
    for text in re.split(r"\n\n", listing):
        if function not in text.partition("\n")[0]:
            continue
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*?)(?:\s+//.*)?$", text, re.MULTILINE)
        places = {address: number for number, (address, _) in enumerate(lines)}
        ends = []
        for number, (_, code) in enumerate(lines):
            branch = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\w+,)\s*([0-9a-f]+) <", code)
            if branch and places.get(branch[1], number) < number:
                ends.append((places[branch[1]], number))
        for first, last in ends:
            body = [code for _, code in lines[first:last]]
            inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in ends)
            if not inner and any(re.match(rf"{instruction}\b", code) for code in body):
                found.append(body)
    return sorted(found, key=len)


def cycles(body: list[str], cpu: str, mca: str) -> float | None:
    """Return llvm-mca's cycles for one turn of a loop; None if the processor lacks an instruction.

    Raises:
        RuntimeError: llvm-mca cannot read the loop.
    """
    text = "\n".join(re.sub(r"<.*?>", "", code) for code in body if not code.startswith("b")) + "\n"
    command = [mca, "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=200", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if "instruction requires" in done.stderr:
        return None
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if done.returncode or not total:
        raise RuntimeError(f"llvm-mca failed: {done.stderr.strip()[:500]}")
    return int(total[1]) / 200


def listings(folder: Path) -> dict[str, str]:
    """Return the machine code of the kernels by instruction set, and of llama.cpp's loop under ""."""
    compiler, isas = compiler_of(COMPILER), isas_of(ARM)
    source, loop = folder / "llama.cpp", folder / "llama.o"
    source.write_text(LLAMA_CPP)
    subprocess.run([COMPILER, "-O3", *isas[0].flags, "-c", str(source), "-o", str(loop)], check=True)
    files = {"": loop} | {isa.name: kernels_library(isa, compiler) for isa in isas}
    return {name: _disassembled(file) for name, file in files.items()}


def _disassembled(file: Path) -> str:
    dump = [OBJDUMP, "-d", "--no-show-raw-insn", str(file)]
    return subprocess.run(dump, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Cycles a weight of the ARM kernels' inner loops, by llvm-mca.")
    parser.add_argument("--cpu", nargs="+", default=CPUS, help="processors that llvm-mca knows (default: %(default)s)")
    parser.add_argument("--mca", default=shutil.which("llvm-mca-19") or "llvm-mca", help="the program")
    options = parser.parse_args(arguments)
    for program in (COMPILER, OBJDUMP, options.mca):
        if shutil.which(program) is None:
            print(f"error: {program} is not installed; apt-get install g++-aarch64-linux-gnu llvm-19", file=sys.stderr)
            return 1
    title = "for each weight and row: instructions, cycles"
    table = Table("loop", "instructions", "bytes a weight", *options.cpu, title=title)
    with tempfile.TemporaryDirectory() as folder:
        code = listings(Path(folder))
    for loop in LOOPS:
        bodies = innermost_loops(code[loop.isa], loop.function, loop.instruction)
        if not bodies:
            print(f"error: no loop with {loop.instruction} in {loop.function} ({loop.isa})", file=sys.stderr)
            return 1
        products = loop.weights * loop.rows
        times = [cycles(bodies[0], cpu, options.mca) for cpu in options.cpu]
        shown = ["" if time is None else f"{time / products:.3f}" for time in times]
        table.add_row(loop.title, f"{len(bodies[0]) / products:.3f}", f"{loop.weight_bytes / loop.weights:.2f}", *shown)
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
