"""Packed weights of twins and backbones, and the parameters that they are made from.

Not handled: a change of single elements through ``parameter.data`` or under ``torch.inference_mode()``, which no stamp
shows; ``river_compile.requantize`` compares the digests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef
from xxhash import xxh3_128

from river_compile.kernels.quant.layouts import PackedLinear
from river_compile.passes.program import Matmul
from river_compile.twins.background import Packing
from river_compile.upstream.tensors import parts_of, version_of

if TYPE_CHECKING:
    from typing_extensions import Self

LOSSLESS = "lossless"  # the "quantizer" of weights that keep their values
_SAMPLE = 64  # elements of each weight in a stamp


class Parameters(NamedTuple):
    """The parameters of one matmul; see :class:`Matmul`."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    folds: tuple[Tensor, ...]

    @classmethod
    def from_inputs(cls, matmul: Matmul, inputs: Sequence[Any]) -> Self:
        """Return them, given the graph's real inputs."""
        return cls(
            tuple(inputs[i] for i in matmul.weights),
            tuple(None if i is None else inputs[i] for i in matmul.biases),
            tuple(inputs[i] for i in matmul.folds),
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (*self.weights, *self.biases, *self.folds) if tensor is not None]


@dataclass(kw_only=True, eq=False)
class TwinWeight:
    """The packed weight of one matmul. SQNR in dB."""

    matmul: Matmul
    weight: PackedLinear  # the packed weight
    # operands after it: the bias [N], if any, and for scaled inputs the norm's parameters divided by the scale, or
    # the scale's inverse
    extras: tuple[Tensor, ...]
    asked: str  # the quantizer in the options
    quantizer: str  # the one that was used
    sqnr: float  # of the weights
    output_sqnr: float | None = None  # of the outputs on the observed text, None without one
    statistics: str = ""  # the quantizer's statistics in words, empty if it read the weights alone
    input_scale: Tensor | None = None  # float32 [K], by which inputs are divided
    digest: str  # of the parameters that it was made from
    made_from: tuple[TensorWeakRef, ...]  # those parameters
    folder: str = ""  # the folder of its file, empty if it was quantized here

    @property
    def name(self) -> str:
        return self.matmul.name

    @property
    def group_size(self) -> int:
        return self.matmul.group_size

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the merged weight."""
        return self.matmul.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The operands of the twin's graph, in order."""
        return self.weight.qweight, self.weight.scale_zero, *self.extras

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def quality(self) -> float:
        """The SQNR of the outputs if known, else of the weights."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr

    def become(self, better: TwinWeight) -> TwinWeight:
        """Take the values of another packing of the same matmul, in this one's memory, and return this one."""
        # Programs read this memory, perhaps now: they draft, so any mixture of both gives the same text.
        for mine, other in zip(self.tensors, better.tensors, strict=True):
            mine.copy_(other)
        for name in ("asked", "quantizer", "sqnr", "output_sqnr", "statistics", "input_scale"):
            setattr(self, name, getattr(better, name))
        return self

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that it was made from, weights first; those that are gone are missing."""
        return [tensor for ref in self.made_from if (tensor := ref()) is not None]

    @property
    def is_current(self) -> bool:
        """Whether the parameters still have the values that it was made from; reads them."""
        tensors = self.parameters
        return len(tensors) == len(self.made_from) and digest_of(tensors) == self.digest

    def dequantize(self) -> Tensor:
        """Return the weight ``[N, K]`` that applies to the unscaled inputs, float32."""
        weight = self.weight.dequantize()
        return weight if self.input_scale is None else weight / self.input_scale


def weak_refs(tensors: Iterable[Tensor]) -> tuple[TensorWeakRef, ...]:
    """Return weak references."""
    return tuple(map(TensorWeakRef, tensors))


def is_in(model: nn.Module, weight: TwinWeight) -> bool:
    """Whether all layers of a matmul are in a model now."""
    paths = {path for path, _ in (*model.named_modules(), *model.named_parameters())}
    return paths.issuperset(weight.name.split("|"))


class ParameterStamp:
    """A fingerprint of tensors that reads a few elements; holds none of them."""

    # It has the tensors' identities, PyTorch's counts of their changes in place, their addresses and some elements:
    # about 5 microseconds for each, before every sequence. The digest reads all bytes, and packed weights are found
    # by it.

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        parts = [part for tensor in tensors for part in parts_of(tensor)]
        self._ids = list(map(id, tensors))
        self._stamps = [(version_of(part), part.data_ptr()) for part in parts]
        self._samples = _samples(parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParameterStamp) or (self._ids, self._stamps) != (other._ids, other._stamps):
            return False
        return all(torch.equal(sample, other._samples[key]) for key, sample in self._samples.items())


def _samples(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """Return the bytes of a few elements of every tensor, by device and dtype."""
    # Of a weight, they are those of its middle row.
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
    """Return the XXH3 (128 bits) of the tensors' dtypes, shapes and bytes."""
    digest = xxh3_128()
    for part in (part for tensor in tensors for part in parts_of(tensor)):
        here = part.detach().cpu().contiguous()
        digest.update(f"{here.dtype}{tuple(here.shape)}".encode())
        digest.update(here.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ProgramWeights:
    """The packed weights of one program, and the stamp of their parameters."""

    def __init__(
        self,
        packed: Mapping[Matmul, TwinWeight],
        parameters: Mapping[Matmul, Parameters],  # of the packed, and perhaps of others
        digests: Callable[[Mapping[Matmul, Parameters]], dict[Matmul, str]],
        made: Sequence[TwinWeight],
        awaits: Packing | None = None,  # the twins are missing that this makes
        has_first: bool = False,  # they were not among those of its first work
    ) -> None:
        self.packed, self._digests, self._awaits, self._has_first = packed, digests, awaits, has_first
        self.made = made  # those of the packed that are new
        self._order = [number for matmul in packed for number in matmul.parameters]
        self._stamp: ParameterStamp | None = ParameterStamp(
            [tensor for matmul in packed for tensor in parameters[matmul].tensors]
        )

    def matches(self, inputs: Sequence[Any]) -> bool:
        """Whether they are made from the parameters among these inputs; reads those whose stamp differs."""
        stamp = ParameterStamp([inputs[i] for i in self._order])
        if stamp == self._stamp:
            return True
        parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in self.packed}
        digests = self._digests(parameters)
        if any(digests[matmul] != made.digest for matmul, made in self.packed.items()):
            return False
        for matmul, made in self.packed.items():
            made.made_from = weak_refs(parameters[matmul].tensors)
        self._stamp = stamp
        return True

    @property
    def is_whole(self) -> bool:
        """Whether no twin is missing."""
        return self._awaits is None

    @property
    def can_be_whole(self) -> bool:
        """Whether missing twins are there by now. Raises the error that ended their making."""
        if self._awaits is None or not (self._awaits.over or (self._awaits.usable and not self._has_first)):
            return False
        self._awaits.check()
        return True

    def forget_stamp(self) -> None:
        """Have the next call of `matches` read the parameters."""
        self._stamp = None

    def accept_move(self, unchanged: bool) -> None:
        """Accept the parameters' new addresses, if they had not changed before."""
        if unchanged:
            self._stamp = ParameterStamp(self._made_from)

    @property
    def is_unchanged(self) -> bool:
        """Whether the parameters have the stamp that they had."""
        return self._stamp is not None and self._stamp == ParameterStamp(self._made_from)

    @property
    def _made_from(self) -> list[Tensor]:
        return [tensor for made in self.packed.values() for tensor in made.parameters]
