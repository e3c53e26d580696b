"""Counts the machine code of a product: a thread's instructions for each weight.

Loops count as often as they run. How often that is follows from the instructions that turn bits into numbers, since a
thread must execute one of them for every weight (or pair of weights) that it has. `LinearSpec` says how many those are.
16-bit weights need none; of those the loads or the matrix instructions are counted. On AMD every step of a product
has the same matrix instructions.

Not handled: loops without weights in them make a kernel with 4-bit weights uncountable; those of others, of row
statistics and patches, count as if they ran once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from river_compile.kernels.triton.linear import LinearSpec

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
#: Of 4 bits, what is OR-ed into a float: by the table of (a & b) | c, or with the constant alone.
_MAKES_WEIGHTS = {
    "w4": re.compile(r"\bLOP3\.LUT\b.*(, 0xea,|0x4b000000)"),
    "bf12": re.compile(r"\bPRMT\b.*(0x5140|0x7362)"),  # (bytes that are put together to a pair)
    "dense row": re.compile(r"\bLDG\S*\.EF\S*\.128\b"),
    "dense dot": re.compile(r"\bHMMA\.16816\b"),
}
_DENSE_AT_ONCE = {"row": 8, "dot": 4}  # of a thread: 16 bytes, or its part of 8 x 16 weights that meet 16 rows
#: Loads of weights into registers: those that must not push anything out of the cache.
_WEIGHT_LOAD = re.compile(r"\bLDG\S*\.EF\b")


@dataclass(frozen=True)
class Code:
    """What the machine code of one launch says.

    Attributes:
        per_weight: instructions that a thread executes, divided by its weights.
        loads_first: whether no load of weights into registers stands behind the first instruction that uses one. Copies
            into shared memory, on which nothing waits where they stand, do not count.
    """

    per_weight: float
    loads_first: bool


def cuobjdump(cubin: bytes, what: str) -> str:
    """Return what NVIDIA's tool says of a compiled kernel: "-sass", its machine code, or "-res-usage"."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(text: str, spec: LinearSpec) -> Code | None:
    """Count a launch of `spec`, of activations in 16 bits, in its disassembly; None where a loop has no weights in it.

    Raises:
        ValueError: the loops cannot make the weights that a thread of this kernel has.
    """
    code = _INSTRUCTION.findall(text)
    last = max(place for place, (_, instruction) in enumerate(code) if re.search(r"\bEXIT\b", instruction))
    code = [(int(address, 16), instruction) for address, instruction in code[: last + 1]]
    loops = [
        (int(found[1], 16), address)
        for address, instruction in code
        if (found := _BRANCH.search(instruction)) and int(found[1], 16) < address
    ]
    dense = spec.weights == "dense"
    made_by = _MAKES_WEIGHTS[f"dense {spec.form}" if dense else spec.weights]
    makers = [address for address, instruction in code if made_by.search(instruction)]
    loads = [address for address, instruction in code if _WEIGHT_LOAD.search(instruction)]
    if dense and not makers:  # (loads of less than 16 bytes)
        return None
    if spec.weights != "w4":
        loops = [(first, end) for first, end in loops if any(first <= address <= end for address in makers)]
    weights = thread_weights(spec)
    inside = [sum(first <= address <= end for address in makers) for first, end in loops]
    if len(loops) > 1 or 0 in inside:
        return None
    made = weights / (_DENSE_AT_ONCE[spec.form] if dense else spec.weights_made_at_once)
    if dense and spec.form == "dot":
        made *= spec.tile.block_m // 16
        made *= max(1, spec.tile.num_warps * 8 // spec.tile.block_n)  # (8 columns a warp; others repeat what it does)
    times = (made - len(makers) + inside[0]) / inside[0] if loops else 1.0
    if times != round(times) or times < 1 or (not loops and made != len(makers)):
        raise ValueError(f"{len(makers)} instructions, {inside} of them in a loop, do not make {made:g} weights")
    looped = sum(loops[0][0] <= address <= loops[0][1] for address, _ in code) if loops else 0
    executed = len(code) + looped * (times - 1)
    return Code(executed / weights, dense or not (loads and makers and max(loads) > min(makers)))


def counted_amd(text: str, spec: LinearSpec) -> float | None:
    """Count a launch of `spec` in AMD's assembly, per weight; None where no loop takes its steps one at a time."""
    code = re.findall(r"^(\.LBB\w+):|^\t((?:[vs]_|ds_|global_|buffer_)\S+(?: +\S.*)?)$", text, re.MULTILINE)
    labels = {label: place for place, (label, _) in enumerate(code) if label}
    jumps = [
        (place, re.search(r"^s_c?branch\S* (\.LBB\w+)", instruction)) for place, (_, instruction) in enumerate(code)
    ]
    loops = [(labels[to[1]], place) for place, to in jumps if to and labels[to[1]] < place]
    if not loops and spec.steps > 1:
        return None
    matrix = [place for place, (_, instruction) in enumerate(code) if instruction.startswith("v_mfma")]

    def size(loop: tuple[int, int]) -> tuple[int, int]:
        return sum(loop[0] <= place <= loop[1] for place in matrix), loop[1] - loop[0]

    first, end = max(loops, key=size, default=(0, -1))
    inside = size((first, end))[0]
    times = spec.steps - ((len(matrix) - inside) / inside if inside else 0)
    if times != round(times) or times < 1:
        return None
    executed = sum(bool(instruction) for _, instruction in code)
    executed += (times - 1) * sum(bool(instruction) for _, instruction in code[first : end + 1])
    return executed / thread_weights(spec, 64)


def thread_weights(spec: LinearSpec, warp: int = 32) -> float:
    """Return how many weights a thread of the kernel has, those beyond the matrix included."""
    tile = spec.tile
    return len(spec.streams) * tile.block_n * tile.block_k * spec.steps / (warp * tile.num_warps)
