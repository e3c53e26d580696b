"""Runs the C++ operators for tests: between guard zones, and again from a tape, into memory that holds NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
import torch

from river_compile.kernels.native.build import supported_isas
from river_compile.kernels.native.load import Tape
from river_compile.kernels.quant.layouts import PackedLinear
from tests.kernels.harness import Guarded, poisoned

native = torch.ops.river_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# By default the instruction set that this machine uses and the portable one; with --slow those in between too, each of
# which is a separate build.
_QUICK = (supported_isas()[0], supported_isas()[-1])
EACH_ISA = [pytest.param(isa, id=isa.name, marks=() if isa in _QUICK else pytest.mark.slow) for isa in supported_isas()]
ISAS = pytest.mark.parametrize("isa", EACH_ISA)


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """Rounds activations ``[M, K]`` to 8 bits, with one scale for each group of each row, in float64."""
    k = x.shape[1]
    groups = torch.nn.functional.pad(x.float(), (0, -k % group)).unflatten(1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # torch computes 127 / x as reciprocal(x) * 127, an ulp away
    q = torch.where(largest > 1e-36, groups * inverse, 0).round().nan_to_num(0.0)
    return (q.double() * (largest / 127).double()).flatten(1)[:, :k]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares NaNs too."""
    a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, **around) -> torch.Tensor:
    """Calls the operator for packed weights; `around`: its other arguments by name."""
    sizes = packed.out_features, packed.group_size
    return native.linear(x, packed.qweight, packed.scale_zero, bias, *sizes, **around)


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **around) -> torch.Tensor:
    """Calls the operator for weights in x's dtype; `around` as in `linear`."""
    return native.dense(x, [weight], [] if bias is None else [bias], **around)


def called(operator: Callable[..., torch.Tensor], *arguments, as_given: Collection[int] = (), **named) -> torch.Tensor:
    """Calls an operator, checks that a tape's replay has the same bits, and guards tensors not in `as_given`."""

    def between_guards(number: int | str, argument: object) -> object:
        if isinstance(argument, PackedLinear):
            return replace(argument, qweight=guard(argument.qweight), scale_zero=guard(argument.scale_zero))
        plain = isinstance(argument, torch.Tensor) and argument.is_contiguous() and number not in as_given
        return guard(argument) if plain else argument

    def guard(tensor: torch.Tensor) -> torch.Tensor:
        buffers.append(Guarded(tensor))
        return buffers[-1].tensor

    buffers: list[Guarded] = []
    given = [between_guards(*pair) for pair in enumerate(arguments)]
    options = {name: between_guards(name, argument) for name, argument in named.items()}
    direct, tape = operator(*given, **options), Tape()
    with tape.recording():
        again = operator(*given, **options)
    again.fill_(math.nan)
    tape.replay()
    assert same_bits(direct, again), "a replay differs from the call"
    for buffer in buffers:
        buffer.check("an argument")
    return direct


class Cache:
    """Keys or values ``[B, J, S, D]`` between guard zones, with gaps between the vectors or with slots before heads."""

    def __init__(self, values: torch.Tensor, gap: int = 0, slots_first: bool = False) -> None:
        self._sizes, self._slots_first = values.shape, slots_first
        b, j, s, d = values.shape
        inner = (s, j) if slots_first else (j, s)
        self._storage = Guarded(poisoned((b, *(n + bool(gap) for n in inner), d + gap), values.dtype))
        self.tensor = self._of(self._storage.tensor)
        self.tensor.copy_(values)

    def _of(self, storage: torch.Tensor) -> torch.Tensor:
        b, j, s, d = self._sizes
        return (storage.transpose(1, 2) if self._slots_first else storage)[:b, :j, :s, :d]

    def check(self, name: str) -> None:
        self._storage.check(name)
        rest = self._storage.tensor.clone()
        self._of(rest).fill_(math.nan)
        assert rest.isnan().all(), f"{name}: written between the vectors"
