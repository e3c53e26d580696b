"""Instruction sets that the C++ kernels are compiled for, best first, and those that this machine runs.

``RIVER_COMPILE_ISA`` names another one than the best. With "amx" and "avx512_bf16", matrices in bfloat16 are multiplied
by tiles or by dot products of pairs, and the rest is "avx512_vnni". Not handled: tiles of integers, and vectors of ARM
beyond what a compiler makes of the portable ones.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

import torch

from river_compile.kernels.checks import one_of

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_AVX512_NEEDS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX2_NEEDS = ("avx2", "fma3", "f16c")


@dataclass(frozen=True)
class Isa:
    """An instruction set: the compiler's flags, and the processor's capabilities as torch names them."""

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]


ISAS = (
    Isa(
        "amx",
        (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
        (*_AVX512_NEEDS, "avx512_vnni", "amx_tile", "amx_bf16"),
    ),
    Isa(
        "avx512_bf16",
        (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
        (*_AVX512_NEEDS, "avx512_vnni", "avx512_bf16"),
    ),
    Isa("avx512_vnni", (*_AVX512, "-mavx512vnni"), (*_AVX512_NEEDS, "avx512_vnni")),
    Isa("avx512", _AVX512, _AVX512_NEEDS),
    Isa("avx_vnni", (*_AVX2, "-mavxvnni"), (*_AVX2_NEEDS, "avx_vnni")),
    Isa("avx2", _AVX2, _AVX2_NEEDS),
    Isa("portable", (), ()),
)


@functools.cache
def runnable() -> tuple[Isa, ...]:
    """Returns the instruction sets of this machine, best first."""
    found = _capabilities()
    if "amx_tile" in found and not (hasattr(torch.cpu, "_init_amx") and torch.cpu._init_amx()):
        found.discard("amx_tile")  # (the system has to let a process use them)
    return tuple(isa for isa in ISAS if found.issuperset(isa.needs))


def chosen() -> Isa:
    """Returns the instruction set to use: ``RIVER_COMPILE_ISA``, or the best.

    Raises:
        ValueError: the variable names none that this machine runs.
    """
    by_name = {isa.name: isa for isa in runnable()}
    wanted = os.environ.get("RIVER_COMPILE_ISA")
    return by_name[one_of(*by_name)("RIVER_COMPILE_ISA", wanted)] if wanted else runnable()[0]


def _capabilities() -> set[str]:
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    least = {"AVX512": (*_AVX512_NEEDS, "avx2"), "AVX2": _AVX2_NEEDS}  # older versions of torch say no more
    return set(least.get(torch.backends.cpu.get_cpu_capability(), ()))
