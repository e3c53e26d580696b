"""The GPUs that kernels are tiled and compiled for: what the cost model and the compiler must know of each."""

from __future__ import annotations

from dataclasses import dataclass

from river_compile.kernels.triton.tiles import nearest_architecture


@dataclass(frozen=True)
class Device:
    name: str  # as in a tuning file
    backend: str  # "cuda" or "hip": with `arch` Triton's name of the target
    arch: int | str
    processors: int  # streaming multiprocessors or compute units
    bandwidth: float  # bytes per second of its memory
    dot_flops: float  # 16-bit matrix operations per second
    shared: int  # bytes of shared memory of a processor
    cache: float  # bytes per second that processors read of the cache they share
    clock: float = 1.7e9  # cycles per second
    lanes: int = 128  # instructions that a processor finishes per cycle
    warp: int = 32  # threads of a warp (wave)
    registers: int = 65536  # of a processor; AMD counts them per lane of each of its four SIMDs
    warps: int = 64  # that a processor can hold


#: Data sheets: NVIDIA A100 SXM 80 GB, H100 SXM, B200, AMD MI300X. Caches are taken to reach two thirds of what their
#: widths give: 5,120 bytes a cycle (A100; H100 the same, B200 on each die), 2,048 on each of eight dies (MI300X).
DEVICES = {
    device.name: device
    for device in (
        Device("sm_80", "cuda", 80, 108, 2.0e12, 312e12, 164 * 1024, 4.8e12, clock=1.4e9, lanes=64),
        Device("sm_90", "cuda", 90, 132, 3.35e12, 990e12, 228 * 1024, 5.8e12),
        Device("sm_100", "cuda", 100, 148, 8.0e12, 2250e12, 228 * 1024, 11.6e12),
        Device("gfx942", "hip", "gfx942", 304, 5.3e12, 1300e12, 64 * 1024, 23e12, 2.1e9, 64, 64, 4 * 512 * 64, 32),
    )
}


def known(name: str) -> Device:
    """Return the device of that name, else the one whose tiles it gets."""
    return DEVICES[nearest_architecture(name, DEVICES)]
