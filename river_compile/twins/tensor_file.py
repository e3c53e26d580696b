"""A safetensors file that states its own hash, with memory-mapped tensors.

Whoever maps the same file shares one copy of its bytes, in the operating system's page cache; what a process writes to
a tensor is its own. Tensors begin at multiples of 64 bytes, a line of a processor's cache, if their sizes are such
multiples (safetensors' own writer aligns to 8). Any reader of safetensors reads the file.

Not handled: files that change after they were checked, and dtypes other than those of packed weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from xxhash import xxh3_128

_DTYPES = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
_NO_HASH = "0" * 32  # XXH3 has 128 bits
_PAGE = 4096  # where the tensors begin


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a new file.

    Args:
        file: where to; its folder exists.
        tensors: contiguous, on the CPU, each with memory of its own.
        metadata: goes into the header, and "xxh3" with it.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # (as safetensors aligns them)
    header = _header(ordered, {**metadata, "xxh3": _NO_HASH})
    digest = xxh3_128(header)
    for _, tensor in ordered:
        digest.update(_content(tensor))
    with file.open("xb") as out:
        out.write(header.replace(_statement(_NO_HASH), _statement(digest.hexdigest())))
        for _, tensor in ordered:
            out.write(_content(tensor))


def read_metadata(file: Path) -> dict[str, str]:
    """Returns the metadata of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def is_whole(file: Path, metadata: Mapping[str, str]) -> bool:
    """Tells whether a file's bytes have the hash that its metadata states; reads it once, in pieces."""
    stated = metadata.get("xxh3", "")
    with file.open("rb") as content:
        length = content.read(8)
        header = content.read(int.from_bytes(length, "little"))
        digest = xxh3_128(length + header.replace(_statement(stated), _statement(_NO_HASH)))
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest() == stated


def mapped(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file, mapped privately: pages are shared until they are written to.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    return load_file(file)


def _header(tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _PAGE)
    return len(header).to_bytes(8, "little") + header


def _statement(digest: str) -> bytes:
    return f'"xxh3":"{digest}"'.encode()


def _content(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
