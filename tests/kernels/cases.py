"""Random cases of the operators on the KV cache, for kernels of every kind."""

import dataclasses

import torch
from hypothesis import strategies as st

from river_compile.kernels.triton.cache import HEAD_NORMS, DecodeAttentionSpec, KvFillSpec
from river_compile.kernels.triton.spec import CacheSpec

DIMS = (16, 24, 64, 80, 96, 128, 256)
NATIVE_DIMS = (8, *DIMS)
CHUNK = 256  # slots that the one-position C++ kernels sum before they combine chunks


@st.composite
def kv_cases(draw, dims=DIMS):
    batch, d = draw(st.integers(1, 3)), draw(st.sampled_from(dims))
    slots = draw(st.integers(1, 9))
    spec = KvFillSpec(
        batch,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        d,
        slots,
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        rotary_dim=draw(st.sampled_from((0, d // 4 * 2, d))),
        rotary_dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        interleaved=draw(st.booleans()),
        half_tables=draw(st.booleans()),
        rotary_rows=draw(st.sampled_from((1, batch))),
        head_norm=draw(st.sampled_from(HEAD_NORMS)),
        index_dtype=draw(st.sampled_from(("int32", "int64"))),
    )
    return spec, draw(st.integers(0, slots - 1)), draw(st.integers(0, 2**20))


@st.composite
def attention_cases(draw, most_slots=150, dims=DIMS[:-1]):
    """Draws a spec of `decode_attention`, the padding of the last sequence and a seed."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    slots = draw(st.integers(1, most_slots))
    padded = draw(st.booleans())
    spec = DecodeAttentionSpec(
        batch,
        kv_heads * draw(st.sampled_from((1, 3, 4, 17))),
        kv_heads,
        draw(st.sampled_from(dims)),
        slots,
        draw(st.sampled_from((0.125, 0.5))),
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        softcap=draw(st.sampled_from((0.0, 2.0, 30.0))),
        mask=padded,
        mask_dtype=draw(st.sampled_from(("bool", "float32", "float16", "bfloat16"))),
        sinks_dtype=draw(st.sampled_from((None, "float32", "float16", "bfloat16"))),
        splits=draw(st.integers(1, 4)),
        block=draw(st.sampled_from((16, 32))),
    )
    padding = draw(st.integers(0, slots - 1)) if padded else 0
    return spec, padding, draw(st.integers(0, 2**20))


@st.composite
def attend_cases(draw, most_slots=100):
    """Draws a spec of attention with a fill, a slot (perhaps outside), padding, a window and a seed."""
    spec, padding, seed = draw(attention_cases(most_slots))
    fill, _, _ = draw(kv_cases())
    shared = {f.name: getattr(spec, f.name) for f in dataclasses.fields(CacheSpec)}
    rotary = draw(st.sampled_from((0, spec.head_dim // 4 * 2, spec.head_dim)))
    rows = draw(st.sampled_from((1, spec.batch)))
    fill = dataclasses.replace(fill, **shared, rotary_dim=rotary, rotary_rows=rows)
    spec = dataclasses.replace(spec, fill=fill, advance=draw(st.booleans()))
    window = draw(st.integers(1, spec.slots))
    return spec, draw(st.integers(-1, spec.slots)), padding, seed, window


def inputs(b: int, h: int, j: int, s: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=g).to(dtype) for shape in ((b, h, d), (b, j, s, d), (b, j, s, d)))


def sinks_of(heads: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns sinks ``[heads]``: some far below a row's scores, some far above."""
    return (4 * torch.randn(heads, generator=torch.Generator().manual_seed(seed))).to(dtype)


@st.composite
def masks(draw, batch: int, slots: int) -> torch.Tensor:
    """Draws masks: any slots, most, or a window of them, perhaps none for one sequence."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    live = torch.rand(batch, slots, generator=g) < draw(st.sampled_from((0.02, 0.5, 1.0)))
    first = draw(st.integers(0, slots - 1))
    live[:, :first] &= draw(st.booleans())
    live[:, first + draw(st.integers(1, slots)) :] = False
    live[0] &= draw(st.booleans())
    return live
