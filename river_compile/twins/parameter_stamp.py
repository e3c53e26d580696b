"""The parameters that a packed matmul was made from, and the detection of changes.

    stamp    which tensors they are, PyTorch's count of their changes in place, their addresses, and a few of their
             elements: about 5 microseconds for each matrix, before every sequence
    digest   XXH3 (128 bits) of all their bytes, at the speed of memory: taken when they are packed, and again if the
             stamp differs

Counts and addresses miss what is written through ``parameter.data`` (as merging adapters does) and under
``torch.inference_mode()``; the elements catch such a change where it reaches one of them, as one of the whole model
does. Not handled: a change of single elements in these ways. ``river_compile.refresh`` compares the digests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef
from xxhash import xxh3_128

from river_compile.passes.program import Matmul
from river_compile.upstream.tensors import parts_of, version_of

_SAMPLE = 64  # elements of each matrix


@dataclass(frozen=True)
class Sources:
    """The parameters of one product; see :class:`Matmul`."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    folds: tuple[Tensor, ...]

    @classmethod
    def of(cls, linear: Matmul, inputs: Sequence[Any]) -> Sources:
        """Returns them, given the real inputs of the graph."""
        return cls(
            tuple(inputs[i] for i in linear.weights),
            tuple(None if i is None else inputs[i] for i in linear.biases),
            tuple(inputs[i] for i in linear.folds),
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (*self.weights, *self.biases, *self.folds) if tensor is not None]

    @functools.cached_property
    def digest(self) -> str:
        """Hash of their bytes, as they were when it was first asked for."""
        return digest_of(self.tensors)

    def known_as(self, digest: str) -> None:
        """Takes in a digest that was made of the same bytes."""
        vars(self)["digest"] = digest

    @property
    def kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(tensor.dtype, tensor.device) for tensor in self.tensors]


def sources_of(linears: Iterable[Matmul], inputs: Sequence[Any]) -> dict[Matmul, Sources]:
    """Returns the parameters of products, given the real inputs of the graph.

    What a twin and the backbone make of the same parameters has the same object, which hashes them once.
    """
    known: dict[tuple[object, ...], Sources] = {}
    return {
        linear: known.setdefault((linear.weights, linear.biases, linear.folds), Sources.of(linear, inputs))
        for linear in linears
    }


class HeldSources:
    """The same, held weakly."""

    def __init__(self, sources: Sources) -> None:
        self._weights, self._biases, self._folds = (
            [None if tensor is None else TensorWeakRef(tensor) for tensor in group]
            for group in (sources.weights, sources.biases, sources.folds)
        )
        self.kinds = sources.kinds

    def get(self) -> Sources | None:
        """Returns them, None if one is gone."""
        groups = [[ref and ref() for ref in refs] for refs in (self._weights, self._biases, self._folds)]
        wanted = sum(ref is not None for ref in (*self._weights, *self._biases, *self._folds))
        found: Any = map(tuple, groups)  # (None where a tensor is gone, which a `Sources` never has for a weight)
        sources = Sources(*found)
        return sources if len(sources.tensors) == wanted else None


class ParameterStamp:
    """How tensors look without reading them: see the module's docstring. Holds none of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        parts = [part for tensor in tensors for part in parts_of(tensor)]
        self._ids = list(map(id, tensors))
        self._stamps = [(version_of(part), part.data_ptr()) for part in parts]
        self._samples = _samples(parts)

    @classmethod
    def together(cls, stamps: Iterable[ParameterStamp]) -> ParameterStamp:
        """Returns the stamp of several groups of tensors, one after another."""
        parts, whole = list(stamps), cls(())
        whole._ids = [number for part in parts for number in part._ids]
        whole._stamps = [stamp for part in parts for stamp in part._stamps]
        keys = dict.fromkeys(key for part in parts for key in part._samples)
        whole._samples = {key: torch.cat([p._samples[key] for p in parts if key in p._samples]) for key in keys}
        return whole

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParameterStamp) or (self._ids, self._stamps) != (other._ids, other._stamps):
            return False
        return all(torch.equal(sample, other._samples[key]) for key, sample in self._samples.items())


def _samples(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """Returns the bytes of a few elements of every vector, and of every matrix's middle row, by device and dtype."""
    rows: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    with torch.inference_mode():
        for tensor in tensors:
            if tensor.dim() and tensor.numel():
                *above, k = tensor.shape
                middle = sum(size // 2 * step for size, step in zip(above, tensor.stride(), strict=False))
                row = tensor.as_strided((min(k, _SAMPLE),), tensor.stride()[-1:], tensor.storage_offset() + middle)
                rows.setdefault((tensor.device, tensor.dtype), []).append(row)
        return {key: torch.cat(row).view(torch.uint8) for key, row in rows.items()}


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Returns the XXH3 (128 bits) of dtypes, shapes and bytes of some tensors."""
    digest = xxh3_128()
    for part in (part for tensor in tensors for part in parts_of(tensor)):
        here = part.detach().cpu().contiguous()
        digest.update(f"{here.dtype}{tuple(here.shape)}".encode())
        digest.update(here.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
