"""Fast and slow cores of one machine (big.LITTLE, hybrid x86), and how many threads kernels run on.

All threads of a kernel wait for the slowest one, so the default is one thread for each fast core. Not handled: pinning
threads to cores (the system's scheduler places them), quotas of containers, and NUMA.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from river_compile.kernels.native.machine import allowed_cores, sysctl_number

_SYSTEM = Path("/sys/devices")
_SLOW = 0.75  # of the fastest core's capacity: slower ones count as slow
_CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables that PyTorch takes its number of threads from


class Cores(NamedTuple):
    """Physical cores that the process may run on."""

    all: int
    fast: int


@functools.cache
def cores() -> Cores:
    """Return the cores of this machine."""
    if sys.platform == "darwin":
        total = sysctl_number("hw.physicalcpu") or os.cpu_count() or 1
        return Cores(total, sysctl_number("hw.perflevel0.physicalcpu") or total)
    return linux_cores(_SYSTEM, allowed_cores())


def threads() -> int:
    """Return the number of threads that kernels run on: PyTorch's, or the fast cores if nothing chose PyTorch's."""
    given = torch.get_num_threads()
    limited = limit()
    return limited.fast if limited and given >= limited.all else given


def limit_text() -> str:
    """Return why kernels run on fewer threads than PyTorch has and what changes that, empty if they do not."""
    given, limited = torch.get_num_threads(), limit()
    if limited is None or given < limited.all:
        return ""
    return (
        f" on the fast cores of {limited.all}, where PyTorch has {given} threads; OMP_NUM_THREADS={given} uses all, "
        f"torch.set_num_threads(n) fewer than {limited.all}"
    )


def limit() -> Cores | None:
    """Return the cores if kernels leave slow ones out, None if there are none or the environment sets the threads."""
    found = cores()
    chosen = any(os.environ.get(name) for name in _CHOICES)
    return None if chosen or found.fast == found.all else found


def linux_cores(system: Path, allowed: Collection[int]) -> Cores:
    """Return the cores among the numbers of `allowed`, from the folder /sys/devices."""
    fast = _fast_by_capacity(system, allowed) or _performance_cores(system, allowed) or {*allowed}
    return Cores(_physical(system, allowed), _physical(system, fast))


def _fast_by_capacity(system: Path, allowed: Collection[int]) -> set[int]:
    """Return the fast cores of an ARM processor, empty where the system names no capacities."""
    capacities = {core: _number(system / f"system/cpu/cpu{core}/cpu_capacity") for core in allowed}
    fastest = max(capacities.values(), default=0)
    return {core for core, capacity in capacities.items() if fastest and capacity >= _SLOW * fastest}


def _performance_cores(system: Path, allowed: Collection[int]) -> set[int]:
    """Return the performance cores of a hybrid x86 processor, empty where there are none."""
    return _numbers(_text(system / "cpu_core/cpus")) & {*allowed}


def _physical(system: Path, numbers: Collection[int]) -> int:
    """Count cores whose hardware threads have these numbers."""
    siblings = (_text(system / f"system/cpu/cpu{number}/topology/thread_siblings_list") for number in numbers)
    return len({text or str(number) for text, number in zip(siblings, numbers, strict=True)})


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as "0-3,8"."""
    ranges = (part.partition("-")[::2] for part in text.split(",") if part)
    return {number for first, last in ranges for number in range(int(first), int(last or first) + 1)}


def _number(file: Path) -> int:
    return int(_text(file) or 0)


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="ascii").strip()
    return ""
