"""The C++ kernels of this machine, and the operators ``torch.ops.river_native.*`` that call them.

    linear             activation(norm(x) W^T + bias) + residual with 4-bit weights; gated as in `ops.linear`
    dense              the same with up to four weights ``[N_i, K]`` in x's dtype, one below the other, and biases
    experts            each row's product with the one that it chose of several stacked weights in 4 bits
    embed              rows of a table, one for each id; an error for an id that has none
    turns              cosines or sines of positions times frequencies ``[..., 2 F]``, as rotary embeddings take them
    norm               norm(x) + residual
    rescore            logits, the largest of them computed anew from a matrix in x's dtype
    kv_fill            q|k|v -> qk-norm, rotary embedding, cache slot; returns q and mutates the caches
    decode_attention   one query position over a static cache
    attention          several: up to 16 each by itself, more in blocks that read a slot once
    few_rows           up to which `dense` is recorded, by whether x has 16 bits and by positions of a sequence
    exit_score         the least cosine of the rows of two matrices
    largest_entropy    the largest entropy of rows of logits, at the last position
    add, advance       int64 numbers added, one of them a vector perhaps; a counter moved on in place
    record, replay     tapes of such calls: see `tape`

Arguments are those of the operators ``river::*`` (see `river_compile.kernels.ops`), but for the layout: `linear` and
`experts` take the bytes of the layout "native", and round x to 8 bits with one scale for each group of each row. A
product's row has the same bits whatever the number of rows and threads, which are ``torch.get_num_threads()``, and so
has attention's, of up to 16 positions and of more; of more than 8 rows `dense` lets a library compute it in float32,
and without vectors of x86 in any dtype.

Not handled: gradients, other devices than the CPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels import portable
from river_compile.kernels.native.build import find_compiler
from river_compile.kernels.native.isa import Isa, chosen
from river_compile.kernels.native.libraries import all_ready_made, kernels_for, operators, packing_for
from river_compile.kernels.portable import fused_width

_loading = threading.Lock()
_tables: dict[str, int] = {}
_begun: dict[str, tuple[Future[Path], Future[Path]]] = {}  # by instruction set: its kernels, and the operators


def load(isa: Isa | None = None) -> Any:
    """Returns ``torch.ops.river_native``, compiling what neither the wheel nor the cache folder has.

    Args:
        isa: the instruction set that the operators use, None for what `chosen` says. The last call decides for the
            whole process.

    Raises:
        CannotBuild: there is no compiler, or it refuses the sources.
        ValueError: as `chosen`.
    """
    isa = isa or chosen()
    with _loading:
        if isa.name not in _tables:
            kernels, bindings = (made.result() for made in _making(isa))
            if not _tables:
                torch.ops.load_library(str(bindings))
                for name, fake in _FAKES.items():
                    torch.library.register_fake(f"river_native::{name}", fake)
            _tables[isa.name] = _table(kernels)
        torch.ops.river_native.use_kernels(_tables[isa.name])
    return torch.ops.river_native


def begin() -> None:
    """Begins to compile what `load` and packing will need, unless it is there, so that others can work meanwhile.

    Raises:
        CannotBuild: there is no compiler.
        ValueError: as `chosen`.
    """
    if not all_ready_made():
        find_compiler()
    with _loading:
        _making(chosen(), packing_for)


def _making(isa: Isa, *others: Callable[[Isa], Path]) -> tuple[Future[Path], Future[Path]]:
    """Returns what makes an instruction set's kernels and the operators, and begins that; `others` come after them."""
    if any(made.done() and made.exception() for made in _begun.get(isa.name, ())):
        del _begun[isa.name]  # (what was in the way may be gone)
    if isa.name not in _begun:
        pool = ThreadPoolExecutor(2)
        _begun[isa.name] = pool.submit(kernels_for, isa), pool.submit(operators)
        for other in others:
            pool.submit(other, isa)
        pool.shutdown(wait=False)
    return _begun[isa.name]


def loaded() -> bool:
    """Tells whether some call of `load` has succeeded."""
    return bool(_tables)


def few_rows(dtype: torch.dtype, positions: int = 1) -> int:
    """Returns up to how many rows of a dtype `dense`, once loaded, runs on our threads and may be recorded.

    Args:
        dtype: of activations and weights.
        positions: of each sequence; the rows are those of all sequences.
    """
    rows: int = torch.ops.river_native.few_rows(dtype.itemsize == 2, positions)
    return rows


def any_rows(dtype: torch.dtype) -> bool:
    """Returns whether `dense` multiplies any number of rows of a dtype itself, and no library more than a few.

    A row's bits do not depend on the others then. False where the kernels are not loaded.
    """
    return loaded() and few_rows(dtype) > few_rows(torch.float32)


def entropies(logits_NV: Tensor) -> Tensor:
    """Returns the entropy of softmax(logits) of each row ``[N]``, in nats, on the logits' device.

    It is the C++ kernels' where they are loaded and the logits on the CPU, else torch's.
    """
    if _tables and logits_NV.is_cpu:
        return torch.stack([torch.ops.river_native.largest_entropy(logits_V[None, None]) for logits_V in logits_NV])
    return portable.entropies(logits_NV)


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


_FAKES: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear_fake,
    "dense": _dense_fake,
    "kv_fill": _kv_fill_fake,
    "decode_attention": _attention_fake,
    "attention": _attention_fake,
    "experts": lambda x, _weight, _scale_zero, _expert, out_features, *_: x.new_empty((x.shape[0], out_features)),
    "embed": lambda ids, table: table.new_empty((*ids.shape, table.shape[1])),
    "turns": lambda positions, frequencies, _scale, _sine, like: like.new_empty(
        (*positions.shape, 2 * len(frequencies))
    ),
    "norm": lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    "rescore": lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    "exit_score": lambda hidden, _previous: hidden.new_empty((), dtype=torch.float32),
    "largest_entropy": lambda logits: logits.new_empty((), dtype=torch.float32),
    "add": _add_fake,
    "advance": lambda *_: None,
    "copy": lambda *_: None,
}
