"""Whether a tensor lies in a mapped file, by what Linux says of this process."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor


def lies_in(tensor: Tensor, file: str | os.PathLike[str]) -> bool:
    """True for a tensor whose memory is a mapping of a file (or of one that was there, and is deleted)."""
    name, address = str(Path(file).resolve()), tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in addresses.split("-"))
        if start <= address < end:
            return path.removesuffix(" (deleted)") == name
    return False
