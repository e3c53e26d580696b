"""The C++ kernels of this machine: loading, the operators ``torch.ops.river_native.*``, tapes of them, and packing.

Arguments are those of `kernels.ops`, without the layout: `linear` and `experts` take the layout "native",
`linear` also "12bit" and "8bit". For 4-bit weights x is rounded to 8 bits, with one scale for each group of each row.
Not handled: gradients, devices other than the CPU, and recording of other operators (`lowering.native` checks).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels import portable
from river_compile.kernels.native.build import (
    CannotBuild,
    Isa,
    choose_isa,
    find_compiler,
    has_prebuilt,
    kernels_library,
    operators_library,
    packing_library,
)
from river_compile.kernels.native.cores import limit
from river_compile.kernels.portable import fused_width, route_like

log = logging.getLogger("river_compile.kernels.native.load")

_loading = threading.Lock()
_tables: dict[str, int] = {}
_begun: dict[str, tuple[Future[Path], Future[Path]]] = {}  # by instruction set: its kernels, and the operators
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARAMETER_DTYPES = (torch.float32, torch.bfloat16)  # of packed scales and zero-points
_LARGEST_GROUP = 128  # that the packing library takes


def load(isa: Isa | None = None) -> Any:
    """Return ``torch.ops.river_native``, compiled if needed; raise as `choose_isa` and `build`."""
    isa = isa or choose_isa()  # the last call decides for the whole process
    with _loading:
        if isa.name not in _tables:
            kernels, bindings = (made.result() for made in _making(isa))
            if not _tables:
                torch.ops.load_library(str(bindings))
                for name, fake in _FAKES.items():
                    torch.library.register_fake(f"river_native::{name}", fake)
                if limited := limit():
                    torch.ops.river_native.use_cores(*limited)
            _tables[isa.name] = _table(kernels)
        torch.ops.river_native.use_kernels(_tables[isa.name])
    return torch.ops.river_native


def begin() -> None:
    """Compile missing libraries in the background; raise as `choose_isa` and `find_compiler`."""
    if not has_prebuilt():
        find_compiler()
    with _loading:
        _making(choose_isa(), packing_library)


def built(seconds: float) -> bool:
    """Whether the libraries of `load` are there, or have failed, after at most `seconds`; raise as `choose_isa`."""
    isa = choose_isa()
    with _loading:
        made = () if isa.name in _tables else _making(isa)
    return not wait(made, seconds).not_done


def _making(isa: Isa, *others: Callable[[Isa], Path]) -> tuple[Future[Path], Future[Path]]:
    """Start or finds the builds of an instruction set's kernels and of the operators; `others` run after them."""
    if any(made.done() and made.exception() for made in _begun.get(isa.name, ())):
        del _begun[isa.name]  # retry: the cause may be gone
    if isa.name not in _begun:
        pool = ThreadPoolExecutor(2)
        _begun[isa.name] = pool.submit(kernels_library, isa), pool.submit(operators_library)
        for other in others:
            pool.submit(other, isa)
        pool.shutdown(wait=False)
    return _begun[isa.name]


def _forget_builds() -> None:
    """In a forked process: drop the builds whose threads it lacks, and a lock that one of them may have held."""
    global _loading
    _loading = threading.Lock()
    for name in [name for name, made in _begun.items() if not all(future.done() for future in made)]:
        del _begun[name]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_builds)


def loaded() -> bool:
    return bool(_tables)


def few_rows(dtype: torch.dtype, positions: int = 1) -> int:
    """Return the most rows of a dtype that `dense` runs itself and records; `positions`: per sequence."""
    rows: int = torch.ops.river_native.few_rows(dtype.itemsize == 2, positions)
    return rows


def any_rows(dtype: torch.dtype) -> bool:
    """Whether `dense` never calls a library, so that a row's bits do not depend on the others. False if not loaded."""
    return loaded() and few_rows(dtype) > few_rows(torch.float32)


def choices(logits_NV: Tensor) -> Tensor:
    """Return each row's first best token and its entropy in nats, float64 ``[N, 2]``: in C++ if it can be."""
    if _chooses(logits_NV):
        found: Tensor = torch.ops.river_native.choices(logits_NV, True)
        return found
    return torch.stack([logits_NV.argmax(-1).double(), portable.entropies(logits_NV).double()], 1)


def best_tokens(logits_NV: Tensor) -> Tensor:
    """Return each row's first best token ``[N]``: in C++ if it can be."""
    if _chooses(logits_NV):
        return torch.ops.river_native.choices(logits_NV, False)[:, 0].long()
    return logits_NV.argmax(-1)


def _chooses(logits_NV: Tensor) -> bool:
    return bool(_tables) and logits_NV.is_cpu and logits_NV.dtype in DTYPES and logits_NV.stride(-1) == 1


def _table(library: Path) -> int:
    function = ctypes.CDLL(str(library)).river_kernels
    function.restype = ctypes.c_void_p
    return function()


def _linear_fake(x: Tensor, _w: Any, _s: Any, _b: Any, out_features: int, _group_size: int, *fused: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], fused_width(out_features, fused)))


def _dense_fake(x: Tensor, weights: list[Tensor], _biases: list[Tensor], *fused: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], fused_width(sum(map(len, weights)), fused)))


def _kv_fill_fake(
    qkv: Tensor, _q: Any, _k: Any, _cos: Any, _sin: Any, slot: Tensor, k_cache: Tensor, *_others: Any
) -> Tensor:
    b, kv_heads, _, d = k_cache.shape
    heads = qkv.shape[-1] // d - 2 * kv_heads
    return qkv.new_empty((b, heads, d) if slot.numel() == 1 else (b, slot.numel(), heads, d))


def _attention_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _add_fake(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(torch.broadcast_tensors(a, b)[0], memory_format=torch.contiguous_format)


_FAKES: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor] | None]] = {
    "linear": _linear_fake,
    "dense": _dense_fake,  # up to four weights in x's dtype, one below the other
    "kv_fill": _kv_fill_fake,
    "decode_attention": _attention_fake,
    "attention": _attention_fake,  # a position's bits do not depend on the others, up to 16 positions and beyond
    "experts": lambda x, _weight, _scale_zero, _expert, out_features, *_: x.new_empty((x.shape[0], out_features)),
    "mixture": lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    "route": lambda logits, each, _routing, floats: route_like(logits, each, floats),
    "embed": lambda ids, table: table.new_empty((*ids.shape, table.shape[1])),
    # Cosines or sines of positions times frequencies, twice as many features as frequencies, or as many (`once`).
    "turns": lambda positions, frequencies, _scale, _sine, like, once=False: like.new_empty(
        (*positions.shape, len(frequencies) * (1 if once else 2))
    ),
    "norm": lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    "rescore": lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    "exit_score": lambda hidden, _previous: hidden.new_empty((), dtype=torch.float32),
    "largest_entropy": lambda logits: logits.new_empty((), dtype=torch.float32),
    "choices": lambda logits, _entropies: logits.new_empty((len(logits), 2), dtype=torch.float64),
    "add": _add_fake,
    "advance": lambda *_: None,
    "copy": lambda *_: None,
}


# Of `Tape.replay_timed`; a kind is its place among these, bits and features are a matmul's, times in nanoseconds.
PHASE_KINDS = ("other", "prepare", "matmul", "kv fill", "attention", "rescore")
PHASE_COLUMNS = ("kind", "parts", "bits", "out_features", "in_features", "begin", "end", "caller", "others")


class Tape:
    """Operator calls recorded once and replayed by one call, on the memory that the tensors had."""

    # While a thread records, its operators compute nothing. The tape owns their outputs; callers keep the inputs.

    def __init__(self) -> None:
        self._address = 0
        self._kept: list[object] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Replace the tape by the calls made inside; raise RuntimeError if the thread records already."""
        address = torch.ops.river_native.record()
        self._drop()
        self._address = address
        try:
            yield
        finally:
            torch.ops.river_native.recorded()

    def keep(self, tensor: object) -> None:
        """Keep a tensor alive that recorded operators read."""
        self._kept.append(tensor)

    def replay(self) -> None:
        """Run the tape with `cores.threads()` threads; raise RuntimeError if nothing was recorded."""
        torch.ops.river_native.replay(self._address)

    def replay_timed(self) -> Tensor:
        """As `replay`; return what each phase took, int64 ``[phases, 9]`` with the columns of ``PHASE_COLUMNS``."""
        times: Tensor = torch.ops.river_native.replay_timed(self._address)
        return times

    @property
    def phases(self) -> int:
        """Recorded phases: one or two for each call."""
        return torch.ops.river_native.tape_phases(self._address)

    @property
    def bytes(self) -> int:
        """Memory for arguments and workspaces, without output tensors."""
        return torch.ops.river_native.tape_bytes(self._address)

    def _drop(self) -> None:
        address, self._address, self._kept = self._address, 0, []
        if address:
            torch.ops.river_native.drop(address)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # torch is taken apart by then, and the system frees the memory
            self._drop()


# Packing. Each call runs on one thread without Python's lock: to pack several weights, call from several threads.


def has_packing() -> bool:
    """Whether the packing library exists or can be compiled."""
    return _packing(choose_isa()) is not None


def can_pack(weight: Tensor, group_size: int = 1, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `fit_grid` and `round_block` take a weight; `dtype`: of the stored scales and zero-points."""
    supported = weight.dtype == torch.float32 and weight.device.type == "cpu" and group_size <= _LARGEST_GROUP
    return supported and dtype in _PARAMETER_DTYPES and has_packing()


def fit_grid(weight: Tensor, group_size: int, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `quant.fit.fit_grid`, for float32 weights; float32 importance ``[K]`` sums to one in each group."""
    rows, groups = weight.shape[0], weight.shape[1] // group_size
    weight, importance = weight.contiguous(), importance.contiguous()
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    sizes = map(ctypes.c_int64, (rows, groups, group_size))
    _call("river_fit_grid", weight, importance, *sizes, ctypes.c_bool(dtype == torch.bfloat16), scale, zero)
    return scale, zero


def round_block(
    left_KN: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    group_of: Tensor,
    factor: Tensor,
    errors_KN: Tensor,
    q_KN: Tensor,
) -> None:
    """As `quant.calibrated._round_block`; all arguments but `factor` are contiguous."""
    sizes = map(ctypes.c_int64, (factor.stride(0), *left_KN.shape))
    _call("river_round_block", left_KN, scale_GN, zero_GN, group_of, factor, *sizes, errors_KN, q_KN)


def pack_mse(weight: Tensor, group_size: int, lines: Tensor, scale_zero: Tensor) -> tuple[float, float] | None:
    """Fill a weight's bytes in the layout "native", rounded to the grids of the least squared error.

    `weight` ``[N, K]`` is contiguous, in float32, bfloat16 or float16. Returns the sums of the squares of its elements
    and of their errors; None if some are not finite.
    """
    energies = torch.empty(2, dtype=torch.float64)
    rows, groups = weight.shape[0], weight.shape[1] // group_size
    sizes = map(ctypes.c_int64, (rows, groups, group_size))
    dtype = ctypes.c_int32(DTYPES.index(weight.dtype))
    finite = _call("river_pack_mse", weight, dtype, *sizes, lines, scale_zero, energies)
    return (energies[0].item(), energies[1].item()) if finite else None


def count_upper(weight: Tensor) -> Tensor:
    """Count each upper byte in a contiguous bfloat16 tensor, int64 ``[256]``."""
    counts = torch.zeros(256, dtype=torch.int64)
    _call("river_count_upper", weight, ctypes.c_int64(weight.numel()), counts)
    return counts


def pack_bf12(weight: Tensor, palette: Tensor, units: Tensor, first: Tensor, patches: Tensor) -> None:
    """Pack a contiguous bfloat16 weight ``[N, K]`` into the buffers of `quant.lossless.pack_12bit`."""
    rows, features = map(ctypes.c_int64, weight.shape)
    _call("river_pack_bf12", weight, rows, features, palette, units, ctypes.c_int64(len(first) - 1), first, patches)


def find_mxfp4(weight: Tensor, blocks: Tensor, scales: Tensor) -> bool:
    """Fill MXFP4's blocks and scales with the values of a contiguous bfloat16 weight; return whether they have them."""
    groups = ctypes.c_int64(scales.numel())
    return bool(_call("river_find_mxfp4", weight, groups, blocks, scales))


def _call(name: str, *arguments: Tensor | ctypes._SimpleCData) -> Any:
    library = _packing(choose_isa())
    assert library is not None, "call `can_pack` or `has_packing` first"
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    return getattr(library, name)(*pointers)


@functools.cache
def _packing(isa: Isa) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(packing_library(isa)))
    except CannotBuild as error:
        log.info("weights are packed in PyTorch: %s", error)
        return None
    for name in ("fit_grid", "round_block", "count_upper", "pack_bf12"):
        getattr(library, f"river_{name}").restype = None
    library.river_pack_mse.restype = library.river_find_mxfp4.restype = ctypes.c_bool
    return library
