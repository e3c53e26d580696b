"""Names the processor that a measurement ran on."""

from __future__ import annotations

import contextlib
import platform


def cpu_model() -> str:
    """Return the processor's name as the operating system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
