"""What the system says about the processor: its architecture, its name, and the features of an ARM one.

Not handled: cores with different instruction sets (Linux names what all cores have), and systems other than Linux and
macOS, of whose ARM processors no feature is known.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import sysconfig
from pathlib import Path

X86, ARM = "x86_64", "aarch64"
_CPUINFO = Path("/proc/cpuinfo")
_SAME = {"amd64": X86, "arm64": ARM}

# Linux: the type of an entry of the auxiliary vector, and the bit of a feature in it (HWCAP_* of its headers).
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_BITS = {
    "neon": (_AT_HWCAP, 1),  # HWCAP_ASIMD
    "dotprod": (_AT_HWCAP, 20),  # HWCAP_ASIMDDP
    "i8mm": (_AT_HWCAP2, 13),
    "bf16": (_AT_HWCAP2, 14),
}
_SYSCTL = {
    "dotprod": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux


def architecture() -> str:
    """Return "x86_64", "aarch64", or another machine's name as Python has it."""
    machine = platform.machine().lower()
    return _SAME.get(machine, machine)


def target_architecture() -> str:
    """Return the architecture that wheels are built for; ``_PYTHON_HOST_PLATFORM`` names another than this one."""
    machine = sysconfig.get_platform().rpartition("-")[2].lower()
    machine = architecture() if machine == "universal2" else machine  # of a macOS Python for two architectures
    return _SAME.get(machine, machine)


def arm_features() -> set[str]:
    """Return which of "neon", "dotprod", "i8mm" and "bf16" an ARM processor has."""
    if sys.platform == "linux":
        words = {kind: auxiliary_value(kind) for kind in (_AT_HWCAP, _AT_HWCAP2)}
        return {name for name, (kind, bit) in _BITS.items() if words[kind] >> bit & 1}
    if sys.platform == "darwin":  # every ARM Mac has Neon
        return {"neon", *(name for name, key in _SYSCTL.items() if sysctl_number(key))}
    return set()


def auxiliary_value(kind: int) -> int:
    """Return a number that Linux gave the process at its start; 0 if it gave none."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(kind))


def sysctl_number(name: str) -> int:
    """Return a 32- or 64-bit number of macOS; 0 if there is none of this name."""
    value = _sysctl(name, 8)
    return int.from_bytes(value, sys.byteorder)


def processor_name() -> str:
    """Return the processor's name; for an ARM processor under Linux its implementer and part numbers."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string", 256).rstrip(b"\0").decode(errors="replace")
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    return _name_in(lines) or platform.processor() or platform.machine()


def _name_in(lines: list[str]) -> str:
    """Return the name in the lines of /proc/cpuinfo; cores of several kinds are named together."""
    fields = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    if named := next((value for key, value in fields if key == "model name"), ""):
        return named
    maker = next((value for key, value in fields if key == "CPU implementer"), "")
    parts = sorted({value for key, value in fields if key == "CPU part"})
    return f"ARM implementer {maker}, part {' and '.join(parts)}" if maker else ""


def _sysctl(name: str, size: int) -> bytes:
    value, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    function = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if function is None or function(name.encode(), value, ctypes.byref(length), None, ctypes.c_size_t(0)):
        return b""
    return value.raw[: length.value]


def last_level_cache(folder: Path = _CACHES) -> int | None:
    """Return the bytes of the first core's outermost cache; None if the system does not say."""
    found: dict[int, int] = {}
    for cache in folder.glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            size = (cache / "size").read_text().strip().removesuffix("K")
            found[int((cache / "level").read_text())] = int(size) << 10
    return found[max(found)] if found else None


def allowed_cores() -> frozenset[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
