"""What a reader must know of a GPU and its software to judge a number that was measured there.

`facts` says what stays for a run, `clocks` what changes meanwhile. Both ask ``nvidia-smi`` for what torch does not say;
where it is missing (ROCm) or refuses, those entries are None. `doubts` names what is likely to spoil a measurement.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from river_compile.kernels.triton.loader import device_name
from tools.kernels.devices import DEVICES

PACKAGES = ("torch", "triton", "transformers", "torchao", "numpy", "river_compile")
_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "throttled": "clocks_throttle_reasons.active",
}
_STATE = {
    "driver": "driver_version",
    "mig": "mig.mode.current",
    "persistence": "persistence_mode",
    "max_sm_mhz": "clocks.max.sm",
    "power_limit_watts": "power.limit",
}


def facts(index: int = 0) -> dict[str, Any]:
    """Return the card, its driver, the versions of everything that makes its code, and who else uses it."""
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "gpu": torch.cuda.get_device_name(index),
        "device": device_name(index),
        "processors": properties.multi_processor_count,
        "memory_free": free,
        "memory_total": total,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
        "triton_wanted": pinned("torch", "triton"),
        "cpus": os.cpu_count(),
        **asked(_STATE, index),
        "others": others(index),
    }


def clocks(index: int = 0) -> dict[str, str | None]:
    """Return clocks in MHz, degrees, watts and the driver's mask of reasons for a lower clock, at this moment."""
    return asked(_CLOCKS, index)


def doubts(found: dict[str, Any], need: int = 0) -> list[str]:
    """Return what of these facts is likely to spoil a measurement; `need` are bytes of memory that it takes."""
    lines = []
    if found["device"] not in DEVICES:
        lines.append(f"{found['device']} is not in the table of devices: kernels get the tiles of an older card")
    if found["triton_wanted"] and found["triton"] != found["triton_wanted"]:
        lines.append(f"torch asks for triton {found['triton_wanted']}, installed is {found['triton']}")
    if found["memory_free"] < need:
        lines.append(f"{found['memory_free'] / 1e9:.1f} GB of memory are free, {need / 1e9:.1f} are needed")
    if found["mig"] not in (None, "Disabled", "[N/A]", "N/A"):
        lines.append(f"MIG is {found['mig']}: this is a part of a card")
    if found["others"]:
        lines.append(f"other processes use the card: {', '.join(found['others'])}")
    return lines


def others(index: int) -> list[str]:
    """Return the processes that compute on the card, but for this one."""
    lines = _nvidia_smi("--query-compute-apps=pid,used_memory", index) or []
    return [f"{pid} ({memory} MiB)" for pid, memory in lines if pid != str(os.getpid())]


def asked(fields: dict[str, str], index: int) -> dict[str, str | None]:
    """Return what nvidia-smi says of these fields, by our names; None for all where it says nothing."""
    lines = _nvidia_smi(f"--query-gpu={','.join(fields.values())}", index)
    if not lines or len(lines[0]) != len(fields):
        return dict.fromkeys(fields)
    return dict(zip(fields, lines[0], strict=True))


def _nvidia_smi(query: str, index: int) -> list[list[str]] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line] for line in csv.reader(done.stdout.splitlines())]


def version_of(package: str) -> str | None:
    """Return the version of a distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pinned(package: str, needed: str) -> str | None:
    """Return the version of a distribution that another one asks for with ``==``, None where it asks for none."""
    try:
        requirements = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        name, found, rest = requirement.partition("==")
        if found and name.strip() == needed:
            return rest.partition(";")[0].strip()
    return None
