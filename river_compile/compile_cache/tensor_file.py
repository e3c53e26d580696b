"""Safetensors files that state their hash: written once, checked, and mapped.

Not handled: what the tensors mean; where a file lies, and whether it appears whole (`folder.py`).
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
_PAGE = 4096  # alignment of the first tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors to a new safetensors file whose metadata states its hash ("xxh3")."""
    # The order of safetensors. The header is padded, so tensors of 64 k bytes begin at a cache line.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header = _header(ordered, {**metadata, "xxh3": _NO_HASH})
    digest = xxh3_128(header)
    for _, tensor in ordered:
        digest.update(_content(tensor))
    with file.open("xb") as out:
        out.write(header.replace(_statement(_NO_HASH), _statement(digest.hexdigest())))
        for _, tensor in ordered:
            out.write(_content(tensor))


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a file. Raises an OSError or a SafetensorError."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def is_whole(file: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a file's bytes have the hash that its metadata states; reads it once, in pieces."""
    stated = metadata.get("xxh3", "")
    with file.open("rb") as content:
        length = content.read(8)
        header = content.read(int.from_bytes(length, "little"))
        digest = xxh3_128(length + header.replace(_statement(stated), _statement(_NO_HASH)))
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest() == stated


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file; writes are copy-on-write. Raises an OSError or a SafetensorError."""
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
