"""A packed weight of a twin or a backbone, and the parameters that it is made from.

    stamp    which tensors they are, PyTorch's count of their changes in place, their addresses, and a few of their
             elements: about 5 microseconds for each matrix, before every sequence
    digest   XXH3 (128 bits) of all their bytes, at the speed of memory: what packed weights are found by

Not handled: a change of single elements through ``parameter.data`` or under ``torch.inference_mode()``, which no stamp
shows; ``river_compile.requantize`` has the digests compared.
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
from river_compile.upstream.tensors import parts_of, version_of

if TYPE_CHECKING:
    from typing_extensions import Self

LOSSLESS = "lossless"  # stands for a quantizer where weights stay what they are
_SAMPLE = 64  # elements of each matrix


class Parameters(NamedTuple):
    """The parameters of one matmul; see :class:`Matmul`."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    folds: tuple[Tensor, ...]

    @classmethod
    def of(cls, matmul: Matmul, inputs: Sequence[Any]) -> Self:
        """Returns them, given the real inputs of the graph."""
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
    """One matmul's weight as its kernel reads it; ratios are signal to quantization noise in dB.

    Attributes:
        matmul: which it is of.
        weight: the packed matrix.
        extras: what the graph takes after it: the bias [N], if any, and for scaled inputs the norm's parameters divided
            by the scale, or its inverse.
        asked, quantizer: the quantizer that the options ask for, and what found it.
        sqnr: of the weights.
        output_sqnr: of the outputs on the observed text, None where nothing was observed.
        statistics: what the quantizer knew of the inputs, in words; empty where it looked at the weights alone.
        input_scale: float32 [K], what its inputs are divided by; None: by nothing.
        digest: of the parameters that it was made from.
        made_from: those, held weakly.
        artifact: the folder that it was read from, empty where it was quantized here.
    """

    matmul: Matmul
    weight: PackedLinear
    extras: tuple[Tensor, ...]
    asked: str
    quantizer: str
    sqnr: float
    output_sqnr: float | None = None
    statistics: str = ""
    input_scale: Tensor | None = None
    digest: str
    made_from: tuple[TensorWeakRef, ...]
    artifact: str = ""

    @property
    def name(self) -> str:
        return self.matmul.name

    @property
    def group_size(self) -> int:
        return self.matmul.group_size

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the merged matrix."""
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
        """The ratio of the outputs if they were observed, else of the weights."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that it was made from and that are still there, its weights first."""
        return [tensor for ref in self.made_from if (tensor := ref()) is not None]

    @property
    def is_current(self) -> bool:
        """Whether those have the values that it was made from; reads them."""
        tensors = self.parameters
        return len(tensors) == len(self.made_from) and digest_of(tensors) == self.digest

    def dequantize(self) -> Tensor:
        """Returns the matrix ``[N, K]`` that the twin multiplies its block's inputs by, float32."""
        weight = self.weight.dequantize()
        return weight if self.input_scale is None else weight / self.input_scale


def held(tensors: Iterable[Tensor]) -> tuple[TensorWeakRef, ...]:
    """Returns weak references."""
    return tuple(map(TensorWeakRef, tensors))


def is_in(model: nn.Module, weight: TwinWeight) -> bool:
    """Whether all layers of a matmul are in a model now."""
    paths = {path for path, _ in (*model.named_modules(), *model.named_parameters())}
    return paths.issuperset(weight.name.split("|"))


class ParameterStamp:
    """How tensors look without reading them: see the module's docstring. Holds none of them."""

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


class ProgramWeights:
    """The packed weights of one program, and how the parameters looked that they stand for.

    Args:
        packed: of its matmuls.
        inputs: of its graph, real tensors, in order.
        digests: returns those of matmuls' parameters.
        made: those of the packed that were not there before.
    """

    def __init__(
        self,
        packed: Mapping[Matmul, TwinWeight],
        inputs: Sequence[Any],
        digests: Callable[[dict[Matmul, Parameters]], dict[Matmul, str]],
        made: Sequence[TwinWeight],
    ) -> None:
        self.packed, self.made, self._digests = packed, made, digests
        self._order = [number for matmul in packed for number in matmul.parameters]
        self._stamp: ParameterStamp | None = ParameterStamp([inputs[i] for i in self._order])

    def stand_for(self, inputs: Sequence[Any]) -> bool:
        """Whether they are made from the parameters among these inputs, by their digests where they look otherwise."""
        stamp = ParameterStamp([inputs[i] for i in self._order])
        if stamp == self._stamp:
            return True
        parameters = {matmul: Parameters.of(matmul, inputs) for matmul in self.packed}
        digests = self._digests(parameters)
        if any(digests[matmul] != made.digest for matmul, made in self.packed.items()):
            return False
        for matmul, made in self.packed.items():
            made.made_from = held(parameters[matmul].tensors)
        self._stamp = stamp
        return True

    def look_again(self) -> None:
        """Has the digests compared the next time, whatever the parameters look like."""
        self._stamp = None

    def moved(self, unchanged: bool) -> None:
        """Takes parameters that were put elsewhere for what they were, if they had not changed before."""
        if unchanged:
            self._stamp = ParameterStamp(self._made_from)

    @property
    def look_the_same(self) -> bool:
        """Whether the parameters that they were made from look as they did."""
        return self._stamp is not None and self._stamp == ParameterStamp(self._made_from)

    @property
    def _made_from(self) -> list[Tensor]:
        return [tensor for made in self.packed.values() for tensor in made.parameters]
