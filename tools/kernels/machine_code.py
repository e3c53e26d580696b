"""Counts the machine code of a product with packed weights for an NVIDIA GPU: a thread's instructions for each weight.

Loops count as often as they run. How often that is follows from the instructions that turn bits into numbers, since a
thread must execute one of them for every weight (or pair of weights) that it has: `LinearSpec` says how many those are.

Not handled: loops without weights in them, such as those of row statistics, which make a kernel uncountable (those of
patches count as if they ran once); AMD.
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
}
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
    """Returns what NVIDIA's tool says of a compiled kernel: "-sass", its machine code, or "-res-usage"."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(text: str, spec: LinearSpec) -> Code | None:
    """Counts a launch of `spec` in its disassembly; None where a loop has no weights in it.

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
    makers = [address for address, instruction in code if _MAKES_WEIGHTS[spec.weights].search(instruction)]
    loads = [address for address, instruction in code if _WEIGHT_LOAD.search(instruction)]
    if spec.weights == "bf12":
        loops = [(first, end) for first, end in loops if any(first <= address <= end for address in makers)]
    weights = thread_weights(spec)
    inside = [sum(first <= address <= end for address in makers) for first, end in loops]
    if len(loops) > 1 or 0 in inside:
        return None
    made = weights / spec.weights_made_at_once
    times = (made - len(makers) + inside[0]) / inside[0] if loops else 1.0
    if times != round(times) or times < 1 or (not loops and made != len(makers)):
        raise ValueError(f"{len(makers)} instructions, {inside} of them in a loop, do not make {made:g} weights")
    looped = sum(loops[0][0] <= address <= loops[0][1] for address, _ in code) if loops else 0
    executed = len(code) + looped * (times - 1)
    return Code(executed / weights, not (loads and makers and max(loads) > min(makers)))


def thread_weights(spec: LinearSpec) -> float:
    """Returns how many weights a thread of the kernel has, those beyond the matrix included."""
    tile = spec.tile
    return len(spec.streams) * tile.block_n * tile.block_k * spec.steps / (32 * tile.num_warps)
