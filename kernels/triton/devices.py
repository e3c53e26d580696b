"""Names of GPUs, as tables of tiles have them."""

from __future__ import annotations

import functools

import torch

DEFAULT_DEVICE = "sm_90"


@functools.cache
def device_name(index: int) -> str:
    """Names a GPU of this machine: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return architecture.split(":")[0] or f"sm_{properties.major}{properties.minor}"


def device_of(tensor: torch.Tensor) -> str:
    """Names the device that tiles are chosen for; a CPU tensor's attention is split as on the default GPU."""
    return device_name(tensor.device.index or 0) if tensor.is_cuda else DEFAULT_DEVICE
