"""From tensors to a kernel: describes the call as a spec, picks its tile, loads it and launches it.

CUDA (and ROCm) tensors run compiled kernels, CPU tensors the same kernels in Triton's interpreter, which is exact and
slow: it is there for tests, and gets large tiles, since its time goes by operations. Buffers are made contiguous where
a kernel wants them so; rows of x may be strided. `ops` registers all of these but `linear` as operators as they are.

Describing, choosing and checking takes longer than many a kernel runs, so it is done for the first of all calls whose
tensors look alike (`_chosen`). A tuning file that is written later counts in the next process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.quant.layouts import PackedLinear

from .decode_attention import DecodeAttentionSpec
from .devices import device_of, known, starts_early
from .exit_score import ExitScoreSpec
from .heuristic import attention_splits, best_tile, interpreter_tile, untiled
from .kv_fill import KvFillSpec
from .linear import LinearSpec, part_name
from .loader import Launch, dtype_name, load
from .shift import ShiftSpec
from .spec import KernelSpec

_MANY = 4096  # different calls that are remembered: prompts of all lengths must not fill the memory
_launches: dict[tuple[object, ...], Launch] = {}


def forget() -> None:
    """Forgets what was chosen for calls, so that the next of each kind chooses anew."""
    _launches.clear()


def _chosen(how: tuple[object, ...], given: dict[str, Tensor], rows: int, describe: Callable[[], KernelSpec]) -> Launch:
    """Returns the launch for a call, described and checked where it is the first one that looks like this.

    Args:
        how: the kernel's name, and what `describe` depends on beside the looks of the tensors.
        given: the tensors, as the kernel takes them.
        rows: of the call.
        describe: returns the spec.

    Raises:
        ValueError: from `describe`, or of the check.
    """
    key = (how, *[(name, t.shape, t.stride(), t.dtype, t.device) for name, t in given.items()])
    found = _launches.get(key)
    if found is None:
        interpret = not next(iter(given.values())).is_cuda
        found = load(describe(), interpret=interpret).launch(rows)
        found.check(given)
        if len(_launches) >= _MANY:
            forget()
        _launches[key] = found
    return found


def _if_possible(dependent: bool, tensor: Tensor) -> bool:
    """Returns `dependent`.

    Raises:
        ValueError: it is True, and the tensor lies where no kernel can start before the one before it has ended.
    """
    if dependent and not (tensor.is_cuda and starts_early(device_of(tensor))):
        where = device_of(tensor) if tensor.is_cuda else f"tensors on {tensor.device}"
        raise ValueError(f"dependent=True needs an NVIDIA GPU from sm_90 on, not {where}; leave it out")
    return dependent


def _there(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def linear(
    x: Tensor,
    weight: PackedLinear | Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    gated: bool,
    dependent: bool = False,
) -> Tensor:
    """Runs a linear kernel; `weight` is packed in the layout "triton" or dense, the rest as in `ops.linear`.

    Several dense matrices stand for one, their rows below each other; each has a bias then, or none has.

    Raises:
        ValueError: a buffer of the wrong shape or dtype, or a combination that no kernel has.
    """
    matrix: dict[str, Tensor]
    if isinstance(weight, PackedLinear):
        pairs = weight.scale_zero.view(torch.int32).squeeze(-1)
        matrix, weight_rows = {"qweight": weight.qweight, "scale_zero": pairs}, weight.out_features
    else:
        parts = _parts(weight)
        matrix, weight_rows = _named("weight", parts), sum(part.shape[0] for part in parts)
    n, k = weight_rows // (2 if gated else 1), x.shape[-1]
    x2 = x.reshape(-1, k)
    rows = x2.shape[0]
    if rows > 1 and (x2.stride(1) != 1 or x2.stride(0) < k):
        x2 = x2.contiguous()
    y = x.new_empty((rows, n))
    if rows == 0:
        return y.reshape(*x.shape[:-1], n)
    if residual is not None:
        residual = residual.reshape(-1, n).contiguous()
    others = _there(norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    given = {"x": x2, **matrix, **others, **_named("bias", _parts(bias)), "y": y}

    def describe() -> LinearSpec:
        spec = untiled(
            rows,
            k,
            n,
            **_weight_fields(weight),
            dtype=dtype_name(x),
            norm=norm,
            eps=eps,
            norm_bias=norm_bias is not None,
            bias=bool(_parts(bias)),
            residual=residual is not None,
            activation=activation,
            gated=gated,
            x_stride=x2.stride(0) if rows > 1 and x2.stride(0) != k else 0,
            dependent=_if_possible(dependent, x),
        )
        return best_tile(spec, device_of(x), rows) if x.is_cuda else interpreter_tile(spec)

    packing = (weight.group_size, weight.scale_zero.dtype) if isinstance(weight, PackedLinear) else ()
    _chosen(("linear", *packing, norm, eps, activation, gated, dependent), given, rows, describe)(given)
    return y.reshape(*x.shape[:-1], n)


def _weight_fields(weight: PackedLinear | Tensor | Sequence[Tensor]) -> dict[str, Any]:
    if isinstance(weight, PackedLinear):
        return {"group_size": weight.group_size, "parameter_dtype": dtype_name(weight.scale_zero)}
    parts = _parts(weight)
    return {"weights": "dense", "group_size": 0, "matrices": tuple(map(len, parts)) if len(parts) > 1 else ()}


def _parts(matrix: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    return () if matrix is None else (matrix,) if isinstance(matrix, Tensor) else matrix


def _named(name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    return {part_name(name, i): part for i, part in enumerate(parts)}


def experts(x: Tensor, weight: PackedLinear, expert: Tensor, dependent: bool = False) -> Tensor:
    """Runs a linear kernel of stacked matrices; arguments as in `ops.experts`, `weight` in the layout "triton".

    Raises:
        ValueError: a buffer of the wrong shape or dtype.
    """
    (rows, k), n, stack = x.shape, weight.out_features, weight.experts
    y = x.new_empty((rows, n))
    if rows == 0:
        return y
    fields = _weight_fields(weight) | {"dtype": dtype_name(x), "dependent": _if_possible(dependent, x)}
    spec = untiled(rows, k, n, **fields, experts=stack)
    spec = best_tile(spec, device_of(x), rows) if x.is_cuda else interpreter_tile(spec)
    matrices = {
        "qweight": weight.qweight.flatten(0, 1),
        "scale_zero": weight.scale_zero.view(torch.int32).squeeze(-1).flatten(0, 1),
    }
    chosen = {"expert": expert.long().contiguous()}
    if not spec.row_by_row:
        chosen = rows_by_expert(chosen["expert"], stack, spec.blocks(rows), spec.tile.block_m)
    load(spec, interpret=not x.is_cuda)(rows=rows, x=x.contiguous(), **chosen, **matrices, y=y)
    return y


def rows_by_expert(expert: Tensor, experts: int, blocks: int, block_m: int) -> dict[str, Tensor]:
    """Sorts rows into blocks of one expert's rows each, without a number that the host would have to wait for.

    Args:
        expert: int64 ``[M]``, the expert of each row; a row with no expert's number goes to blocks of E.
        experts: E.
        blocks: how many are made; enough for whatever the rows chose (`LinearSpec.blocks`).
        block_m: rows of a block.

    Returns:
        "row": int64 ``[blocks * block_m]``, M where a block has a gap; "expert": int64 ``[blocks]``, E for a block
        without rows.
    """
    rows = len(expert)
    expert = torch.where((expert >= 0) & (expert < experts), expert, experts)
    found, order = expert.sort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=expert.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    needed = (counts + block_m - 1) // block_m  # blocks of each expert
    ends = needed.cumsum(0)
    before = counts.cumsum(0) - counts  # rows of earlier experts
    starts = (ends - needed) * block_m
    place = starts[found] + torch.arange(rows, device=expert.device) - before[found]
    row = torch.full((blocks * block_m,), rows, dtype=torch.int64, device=expert.device)
    owner = torch.searchsorted(ends, torch.arange(blocks, device=expert.device), right=True)
    return {"row": row.scatter_(0, place, order), "expert": owner}


def kv_fill(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    dependent: bool = False,
) -> Tensor:
    """Splits q|k|v of one position, transforms the heads, writes one slot of the caches and returns the query.

    Args:
        qkv: ``[B, (H + 2 J) D]``, or any leading shape of B elements.
        q_norm, k_norm: ``[D]`` weights of the heads' norm, or None.
        cos, sin: ``[..., R]`` with 1 or B rows, as Hugging Face models give them; None for no rotary embedding.
        slot: int32 or int64, one element: the slot to write. Outside of 0..S - 1 nothing is written.
        k_cache, v_cache: ``[B, J, S, D]`` in qkv.dtype, features contiguous. Mutated.
        norm: "rms" or "rms_plus_one" where q_norm and k_norm are given, else "none".
        eps: of the norm.
        interleaved: whether rotated pairs are neighbours instead of R / 2 apart.
        dependent: whether the launch may start while the one before it runs (NVIDIA, from sm_90 on).

    Returns:
        The query ``[B, H, D]`` in qkv.dtype.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together.
    """
    how = (norm, eps, interleaved, dependent)
    describe, given, q = _filling(qkv, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, *how)
    given["q"] = q
    _chosen(("kv_fill", *how), given, 1, describe)(given)
    return q


def attend(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slot: Tensor | None,
    counter: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    dependent: bool = False,
) -> Tensor:
    """Does in one launch what `kv_fill` and then `decode_attention` do, and may count the token.

    Args:
        qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, norm, eps, interleaved, dependent: as of `kv_fill`.
        slot: the slot to write, as of `kv_fill`; None where `counter` is given.
        counter: int32 or int64, one element: the slot to write, to which one is added afterwards; or None. Mutated.
        mask, scale, softcap: as of `decode_attention`; the mask says of the new slot too whether it takes part.

    Returns:
        ``[B, H, D]`` in qkv.dtype.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together, or not one of slot and counter.
    """
    place = slot if counter is None else counter
    if place is None or (slot is not None and counter is not None):
        raise ValueError("give a slot or a counter, which is one that advances")
    how = (norm, eps, interleaved, dependent)
    fill, given, out = _filling(qkv, q_norm, k_norm, cos, sin, place, k_cache, v_cache, *how)
    advance = counter is not None

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap, dependent, fill(), advance)

    given |= _there(mask=None if mask is None else mask.contiguous()) | {"out": out}
    _chosen(("attend", *how, scale, softcap, advance), given, 1, describe)(given)
    return out


def _filling(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    dependent: bool,
) -> tuple[Callable[[], KvFillSpec], dict[str, Tensor], Tensor]:
    """Returns what describes a call that fills a slot, its buffers but for the result, and an empty ``[B, H, D]``."""
    b, kv_heads, slots, d = k_cache.shape
    heads = qkv.shape[-1] // d - 2 * kv_heads
    if qkv.numel() != b * (heads + 2 * kv_heads) * d or heads < 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: not one position of q|k|v for caches of {(b, kv_heads, d)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together; one of them is None")
    tables: dict[str, Tensor] = {}
    if cos is not None and sin is not None:
        tables = {
            "cos": cos.reshape(-1, cos.shape[-1]).contiguous(),
            "sin": sin.reshape(-1, sin.shape[-1]).contiguous(),
        }
    others = _there(q_norm=q_norm, k_norm=k_norm)
    given = {"qkv": qkv.reshape(b, -1, d).contiguous(), "slot": slot.reshape(-1), **others, **tables}
    given |= {"k_cache": k_cache, "v_cache": v_cache}

    def describe() -> KvFillSpec:
        strides, index = _cache_strides(k_cache, v_cache), dtype_name(slot)
        how: dict[str, Any] = {"head_norm": norm, "eps": eps, "cache_strides": strides, "index_dtype": index}
        how["dependent"] = _if_possible(dependent, qkv)
        if tables:
            rows, features = tables["cos"].shape
            how |= {"rotary_dim": features, "rotary_dtype": dtype_name(tables["cos"]), "rotary_rows": rows}
        return KvFillSpec(b, heads, kv_heads, d, slots, dtype=dtype_name(qkv), interleaved=interleaved, **how)

    return describe, given, qkv.new_empty((b, heads, d))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    dependent: bool = False,
) -> Tensor:
    """Attends from one query position to the slots of a static cache.

    Args:
        q: ``[B, H, D]``.
        k_cache, v_cache: ``[B, J, S, D]`` in q.dtype, features contiguous; J divides H.
        mask: ``[B, S]``: bool, True for slots that take part, or floating, added to the scores, where at most half of
            the dtype's least number leaves a slot out. None for all. A row without any slot gives 0.
        scale: of the scores.
        softcap: c in c tanh(score / c); 0 for none.
        dependent: as of `kv_fill`.

    Returns:
        ``[B, H, D]`` in q.dtype.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together.
    """
    b, _, d = q.shape
    if k_cache.shape[0] != b or k_cache.shape[3] != d:
        raise ValueError(f"q has shape {tuple(q.shape)} and the caches have {tuple(k_cache.shape)}: B or D differs")
    out = q.new_empty(q.shape)
    given = {"q": q.contiguous(), "k_cache": k_cache, "v_cache": v_cache, "out": out}
    if mask is not None:
        given["mask"] = mask.contiguous()

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap, dependent)

    _chosen(("decode_attention", scale, softcap, dependent), given, 1, describe)(given)
    return out


def _attention(
    out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    dependent: bool,
    fill: KvFillSpec | None = None,
    advance: bool = False,
) -> DecodeAttentionSpec:
    (b, heads, d), (kv_heads, slots) = out.shape, k_cache.shape[1:3]
    return DecodeAttentionSpec(
        b,
        heads,
        kv_heads,
        d,
        slots,
        scale,
        dtype=dtype_name(out),
        softcap=softcap,
        mask=mask is not None,
        mask_dtype="bool" if mask is None else dtype_name(mask),
        splits=attention_splits(b * kv_heads, slots, known(device_of(out))),
        cache_strides=_cache_strides(k_cache, v_cache),
        fill=fill,
        advance=advance,
        dependent=_if_possible(dependent, out),
    )


def shift(k_cache: Tensor, v_cache: Tensor, dependent: bool = False) -> Tensor:
    """Moves all entries of a full window up by one slot, and returns the slot that this frees.

    Args:
        k_cache, v_cache: ``[B, J, S, D]`` of one dtype, features contiguous. Mutated; the last slot stays as it is.
        dependent: as of `kv_fill`.

    Returns:
        S - 1, int64 ``[1]``.

    Raises:
        ValueError: caches whose shapes, strides or dtypes do not fit together.
    """
    b, kv_heads, slots, d = k_cache.shape
    slot = k_cache.new_empty(1, dtype=torch.int64)
    given = {"k_cache": k_cache, "v_cache": v_cache, "slot": slot}

    def describe() -> ShiftSpec:
        strides, early = _cache_strides(k_cache, v_cache), _if_possible(dependent, k_cache)
        return ShiftSpec(
            b, kv_heads, kv_heads, d, slots, dtype=dtype_name(k_cache), cache_strides=strides, dependent=early
        )

    _chosen(("shift", dependent), given, 1, describe)(given)
    return slot


def residual_score(
    update: Tensor, residual: Tensor, previous: Tensor, dependent: bool = False
) -> tuple[Tensor, Tensor]:
    """Adds a residual and measures the exit score, in one launch (on the CPU: in Triton's interpreter).

    Args:
        update, residual, previous: ``[..., D]`` of one shape and dtype.
        dependent: as of `kv_fill`.

    Returns:
        hidden = residual + update ``[..., D]``, and its smallest similarity to `previous` over all rows, float32
        ``[]``, NaN where a row has none.

    Raises:
        ValueError: tensors of different shapes or dtypes.
    """
    return _exit_score(update, residual, previous, dependent)


def residual_verdict(
    update: Tensor,
    residual: Tensor,
    previous: Tensor,
    rule: Tensor,
    verdict: Tensor,
    past: Tensor | None,
    dependent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Does what `residual_score` does, decides whether the score leaves, and notes that, in one launch.

    Args:
        update, residual, previous: as of `residual_score`.
        rule: float64 ``[2]``, the bar and whether the check is asked; see :mod:`.exit_score`.
        verdict: float32 ``[4]``, the score and in bytes 4 and 5 the booleans "leaves" and "stays". Mutated.
        past: float32 ``[N + 1]``, the last N scores and how many there are, where their mean decides; or None. Mutated.
        dependent: as of `kv_fill`.

    Returns:
        As `residual_score`.

    Raises:
        ValueError: tensors of different shapes, or of other shapes or dtypes than these.
    """
    return _exit_score(update, residual, previous, dependent, rule, verdict, past)


def _exit_score(
    update: Tensor,
    residual: Tensor,
    previous: Tensor,
    dependent: bool,
    rule: Tensor | None = None,
    verdict: Tensor | None = None,
    past: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    inputs = {"update": update, "residual": residual, "previous": previous}
    given = {name: tensor.reshape(-1, update.shape[-1]).contiguous() for name, tensor in inputs.items()}
    hidden = torch.empty_like(given["update"])
    score = update.new_empty(1, dtype=torch.float32)
    given |= {"hidden": hidden, "score": score, **_there(rule=rule, verdict=verdict, past=past)}
    rows, features = hidden.shape

    def describe() -> ExitScoreSpec:
        early, history = _if_possible(dependent, update), 0 if past is None else len(past) - 1
        decides = rule is not None
        return ExitScoreSpec(rows, features, dtype_name(update), decides, history, dependent=early)

    _chosen(("exit_score", dependent), given, 1, describe)(given)
    return hidden.view(update.shape), score.view(())


def _cache_strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, ...]:
    """Returns the strides of sequence, head and slot that both caches share, empty for contiguous ones."""
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            "the caches must have one shape and stride with contiguous features; these have "
            f"{tuple(k_cache.shape)}, {k_cache.stride()} and {tuple(v_cache.shape)}, {v_cache.stride()}"
        )
    return () if k_cache.is_contiguous() else k_cache.stride()[:3]
