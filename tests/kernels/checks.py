"""One check per kernel family: makes inputs, runs the guarded kernel, compares with the float64 reference.

Property and GPU tests share them. Inputs and references are made on the device: a large model's would take
minutes on a CPU in float64.
"""

import dataclasses
from collections.abc import Callable

import torch

from river_compile.kernels.quant import lossless
from river_compile.kernels.triton.cache import DecodeAttentionSpec, ExitScoreSpec, KvFillSpec
from river_compile.kernels.triton.calls_linear import rows_by_expert
from river_compile.kernels.triton.linear import LinearSpec, part_name
from river_compile.kernels.triton.spec import KernelSpec
from tests.kernels import reference
from tests.kernels.cases import sinks_of
from tests.kernels.harness import assert_close, assert_sqnr, dots_in_order, poisoned, run_guarded
from tests.kernels.packing import pack_linear

KV = ("k_cache", "v_cache")
_EXPERTS = 16  # of a model's, as many are checked: their float64 reference must fit the card
VALUES = ("normal", "constant", "extreme", "tiny")

# Runs the kernel that a spec describes on named buffers and returns them as it left them, as `run_guarded` does.
Run = Callable[..., dict[str, torch.Tensor]]


def weights(n: int, k: int, values: str, outlier: float, generator: torch.Generator) -> torch.Tensor:
    """Returns a float32 weight: normal, all equal, with outliers, or close to zero."""
    weight = torch.randn(n, k, generator=generator, device=generator.device) / k**0.5
    if values == "constant":
        return torch.full_like(weight, 0.37)
    if values == "extreme":
        weight[:, ::7] *= outlier
    return weight * 1e-6 if values == "tiny" else weight


def check_linear(spec: LinearSpec, rows: int = 1, values: str = "normal", seed: int = 0, device: str = "cpu") -> None:
    g = torch.Generator(device).manual_seed(seed)
    dtype, n, k = getattr(torch, spec.dtype), spec.out_features, spec.in_features
    # Beyond float16 scale and zero are bfloat16; a float16 `tl.dot` still wants every weight itself within float16.
    weight = weights(n * len(spec.streams), k, values, 2e3 if spec.dtype == "float16" else 2e6, g)
    if spec.weights == "w4":
        packed = pack_linear(weight, spec.group_size, "triton", "rtn")
        exact = packed.dequantize(torch.float64)
        spec = dataclasses.replace(spec, parameter_dtype=str(packed.scale_zero.dtype).removeprefix("torch."))
        buffers = {"qweight": packed.qweight, "scale_zero": packed.scale_zero.view(torch.int32).squeeze(-1)}
    elif spec.weights == "bf12":
        exact = (_with_patches(weight, g) if values == "constant" else weight).bfloat16()
        units, side = (part.to(device) for part in lossless.pack_12bit(exact.cpu()))
        buffers = {"units": units.flatten(1).view(torch.int32), "side": side}
    else:
        exact = weight.clamp(-1e4, 1e4).to(dtype)
        buffers = _in_parts("weight", exact, spec)
    x = torch.full((rows, spec.x_stride or k), float("nan"), dtype=dtype, device=device)
    # Inputs of extreme weights are small, so that the result stays within float16.
    x[:, :k] = (torch.randn(rows, k, generator=g, device=device) * (1e-4 if values == "extreme" else 1.0)).to(dtype)
    extras = {
        "norm_weight": torch.randn(k, generator=g, device=device).to(dtype) if spec.norm != "none" else None,
        "norm_bias": torch.randn(k, generator=g, device=device).to(dtype) if spec.norm_bias else None,
        "bias": torch.randn(len(exact), generator=g, device=device).to(dtype) if spec.bias else None,
        "residual": torch.randn(rows, n, generator=g, device=device).to(dtype) if spec.residual else None,
    }
    buffers |= {name: tensor for name, tensor in extras.items() if tensor is not None}
    if spec.matrices and spec.bias:
        buffers |= _in_parts("bias", extras["bias"], spec)
    result = run_guarded(spec, rows, device, x=x, y=poisoned((rows, n), dtype, device), **buffers)["y"]
    h = reference.norm(x[:, :k], spec.norm, extras["norm_weight"], extras["norm_bias"], spec.eps)
    bias, residual = extras["bias"], extras["residual"]
    options = {"activation": spec.activation, "gated": spec.gated}
    expected = reference.linear(h, exact, bias=bias, residual=residual, **options)
    if spec.dtype == "float16" and expected.abs().max() > 6e4:
        return  # a correct result overflows too
    assert_close(result, expected, linear_magnitude(spec, h, exact, bias, residual))
    if values == "normal" and expected.numel() >= 32:  # of fewer elements one cancellation decides the ratio
        assert_sqnr(result, expected, dtype)


def _with_patches(weight: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Mixes rows around 1, with tiny patches, and rows of powers of 4, with large ones: a misplaced patch shows."""

    def drawn(share: float, shape: torch.Size = weight.shape) -> torch.Tensor:
        return torch.rand(shape, generator=g, device=g.device) < share

    def whole(first: int, last: int) -> torch.Tensor:
        return torch.randint(first, last + 1, weight.shape, generator=g, device=g.device)

    level = 1 + torch.rand(weight.shape, generator=g, device=g.device)
    level = torch.where(drawn(0.02), 2.0 ** whole(-120, -20), level)
    steep = torch.where(drawn(0.02), 2.0**20, 4.0 ** whole(0, 7))
    steep = torch.where(drawn(0.5), steep, -steep)
    return torch.where(drawn(0.5, weight[:, :1].shape), level, steep)


def _in_parts(name: str, whole: torch.Tensor, spec: LinearSpec) -> dict[str, torch.Tensor]:
    """Returns the buffers of several weights, or of the only one."""
    return {part_name(name, i): part for i, part in enumerate(whole.split(spec.matrices or len(whole)))}


def check_experts(
    spec: LinearSpec, expert: list[int], values: str = "normal", seed: int = 0, device: str = "cpu"
) -> None:
    """Checks stacked weights, where row m of x takes number expert[m]; the others hold NaN."""
    g = torch.Generator(device).manual_seed(seed)
    dtype, n, k, experts = getattr(torch, spec.dtype), spec.out_features, spec.in_features, spec.experts
    stack = weights(experts * n * len(spec.streams), k, values, 2e3, g)
    packed = pack_linear(stack, spec.group_size, "triton", "rtn")
    exact = packed.dequantize(torch.float64).unflatten(0, (experts, -1))
    spec = dataclasses.replace(spec, parameter_dtype=str(packed.scale_zero.dtype).removeprefix("torch."))
    unread = torch.tensor([e not in expert for e in range(experts)], device=device)
    packed.scale_zero.unflatten(0, (experts, -1))[unread] = float("nan")
    x = (torch.randn(len(expert), k, generator=g, device=device) * (1e-4 if values == "extreme" else 1.0)).to(dtype)
    chosen = {"expert": torch.tensor(expert, device=device)}
    if not spec.row_by_row:
        chosen = rows_by_expert(chosen["expert"], experts, spec.blocks(len(expert)), spec.tile.block_m)
    pairs = packed.scale_zero.view(torch.int32).squeeze(-1)
    buffers = {"x": x, "qweight": packed.qweight, "scale_zero": pairs, "y": poisoned((len(expert), n), dtype, device)}
    result = run_guarded(spec, len(expert), device, **buffers, **chosen)["y"]
    for row, e in enumerate(expert):
        if not 0 <= e < experts:
            assert not result[row].any(), "a row without an expert"
            continue
        h = x[row : row + 1].double()
        expected = reference.linear(h, exact[e], activation=spec.activation, gated=spec.gated)
        assert_close(result[row : row + 1], expected, linear_magnitude(spec, h, exact[e], None, None))


def linear_magnitude(spec: LinearSpec, h, weight, bias, residual) -> torch.Tensor:
    """Returns the sum of magnitudes of every element of the result, through activation and gate."""
    total = h.abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    y = torch.nn.functional.linear(h, weight.double(), None if bias is None else bias.double())
    total = activated_magnitude(y, total, spec.activation, spec.gated)
    return total + (0 if residual is None else residual.double().abs())


def activated_magnitude(y: torch.Tensor, total: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """Propagates the magnitudes `total` of y through an activation, whose slope is at most 1.2."""
    if not gated:
        return 1.2 * total
    (gate, up), (gate_total, up_total) = y.chunk(2, -1), total.chunk(2, -1)
    return 1.2 * (1.2 * gate_total * up.abs() + reference.activate(gate, activation).abs() * up_total)


def check_kv_fill(spec: KvFillSpec, slot: int, seed: int = 0, device: str = "cpu", run: Run = run_guarded) -> None:
    g = torch.Generator(device).manual_seed(seed)
    buffers, (q, k, v) = filling(spec, slot, g)
    magnitude_q, magnitude_k = (x.abs().amax(-1, keepdim=True) * 2 for x in (q, k))
    shape = (spec.batch, spec.kv_heads, spec.slots, spec.head_dim)
    dtype = getattr(torch, spec.dtype)
    caches = {name: torch.randn(shape, generator=g, device=device).to(dtype) for name in ("k_cache", "v_cache")}
    empty = poisoned(q.shape, dtype, device)
    result = run(spec, device=device, q=empty, **buffers, **caches)
    assert_close(result["q"], q, magnitude_q)
    check_slot(result, caches, slot, k, v, magnitude_k)


def filling(
    spec: KvFillSpec, slot: int, g: torch.Generator
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Returns the buffers that fill a slot, and query, key and value in float64."""
    device, dtype, d = g.device, getattr(torch, spec.dtype), spec.head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    qkv = random(spec.batch, spec.all_heads, d).to(dtype)
    buffers = {"qkv": qkv, "slot": torch.tensor([slot], dtype=getattr(torch, spec.index_dtype), device=device)}
    q, k, v = qkv.double().split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    if spec.head_norm != "none":
        buffers |= {"q_norm": random(d).to(dtype), "k_norm": random(d).to(dtype)}
        q = reference.norm(q, spec.head_norm, buffers["q_norm"], None, spec.eps)
        k = reference.norm(k, spec.head_norm, buffers["k_norm"], None, spec.eps)
    if spec.rotary_dim:
        angle = random(spec.rotary_rows, spec.angles)
        tables = {"cos": angle.cos().to(getattr(torch, spec.rotary_dtype))}
        tables["sin"] = angle.sin().to(tables["cos"].dtype)
        buffers |= tables
        whole = [reference.whole_table(t, spec.interleaved) if spec.half_tables else t for t in tables.values()]
        q, k = (reference.rotate(t, *(table[:, None] for table in whole), spec.interleaved) for t in (q, k))
    return buffers, (q, k, v)


def check_slot(
    result: dict[str, torch.Tensor],
    caches: dict[str, torch.Tensor],
    slot: int,
    k: torch.Tensor,
    v: torch.Tensor,
    magnitude_k: torch.Tensor,
) -> None:
    """Checks that the slot holds key and value, and that every other slot is unchanged."""
    slots = caches["k_cache"].shape[2]
    written = torch.zeros(slots, dtype=torch.bool, device=k.device)
    if 0 <= slot < slots:
        written[slot] = True
        assert_close(result["k_cache"][:, :, slot], k, magnitude_k)
        assert_close(result["v_cache"][:, :, slot], v, v.abs())
    for name, cache in caches.items():
        kept, before = (c[:, :, ~written].contiguous().view(torch.uint8) for c in (result[name], cache))
        assert torch.equal(kept, before), f"{name}: another slot changed"


def check_attend(
    spec: DecodeAttentionSpec,
    slot: int,
    padding: int = 0,
    seed: int = 0,
    window: int | None = None,
    device: str = "cpu",
) -> None:
    """Checks an attention that fills a slot: the slot (NaN before, like masked ones), the sum, the counter."""
    buffers = attend_buffers(spec, slot, padding, seed, window, device)
    caches = {name: buffers[name] for name in ("k_cache", "v_cache")}
    result = run_guarded(spec, device=device, **buffers)
    assert int(result["slot"]) == slot + spec.advance
    _, (q, k, v) = filling(spec.fill, slot, torch.Generator(device).manual_seed(seed))
    check_slot(result, caches, slot, k, v, k.abs().amax(-1, keepdim=True) * 2)
    live = live_slots(spec, padding, window, device)
    # Keys are what the kernel made and rounded, which was checked; the query is rounded as there.
    k, v = (result[name].masked_fill(~live[:, None, :, None], 0.0) for name in caches)
    options = {"scale": spec.scale, "softcap": spec.softcap, "mask": live, "sinks": buffers.get("sinks")}
    q = as_rounded(q, getattr(torch, spec.dtype))
    expected = reference.attention(q, k, v, added=added_by(buffers, live), **options)
    assert_close(result["out"], expected, v.double().abs().amax((1, 2, 3))[:, None, None].clamp_min(1.0))


def as_rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds as the device of x does: the interpreter, on the CPU, truncates to bfloat16."""
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        return (x.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return x.to(dtype)


def attend_buffers(
    spec: DecodeAttentionSpec, slot: int, padding: int, seed: int, window: int | None, device: str
) -> dict[str, torch.Tensor]:
    """Returns the buffers of an attention that fills a slot; the slot and masked slots hold NaN."""
    g = torch.Generator(device).manual_seed(seed)
    buffers, _ = filling(spec.fill, slot, g)
    live = live_slots(spec, padding, window, device)
    unread = ~live
    if 0 <= slot < spec.slots:
        unread = unread | (torch.arange(spec.slots, device=device) == slot)
    for name in ("k_cache", "v_cache"):
        cache = torch.randn(spec.batch, spec.kv_heads, spec.slots, spec.head_dim, generator=g, device=device)
        buffers[name] = cache.to(getattr(torch, spec.dtype)).masked_fill(unread[:, None, :, None], float("nan"))
    out = poisoned((spec.batch, spec.heads, spec.head_dim), getattr(torch, spec.dtype), device)
    return {**buffers, **mask_buffers(spec, live, g), **sink_buffers(spec, seed, device), "out": out}


def live_slots(spec: DecodeAttentionSpec, padding: int, window: int | None, device: str) -> torch.Tensor:
    """Returns unmasked slots [B, S]: of the last sequence without `padding`, and at most `window` of those."""
    live = torch.ones(spec.batch, spec.slots, dtype=torch.bool, device=device)
    if spec.mask:
        live[-1, :padding] = False
        live[-1, spec.slots if window is None else padding + window :] = False
    return live


def mask_buffers(spec: DecodeAttentionSpec, live: torch.Tensor, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns the mask of the spec, if any; an added mask holds noise for unmasked slots."""
    if not spec.mask or spec.mask_dtype == "bool":
        return {"mask": live} if spec.mask else {}
    dtype = getattr(torch, spec.mask_dtype)
    added = torch.randn(live.shape, generator=g, device=live.device).to(dtype)
    return {"mask": added.masked_fill(~live, torch.finfo(dtype).min)}


def sink_buffers(spec: DecodeAttentionSpec, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Returns the sinks of the spec, if any."""
    if spec.sinks_dtype is None:
        return {}
    return {"sinks": sinks_of(spec.heads, seed, getattr(torch, spec.sinks_dtype)).to(device)}


def added_by(buffers: dict[str, torch.Tensor], live: torch.Tensor) -> torch.Tensor:
    """Returns the mask's additions to the scores of unmasked slots, 0 elsewhere."""
    mask = buffers.get("mask", live)
    return torch.zeros(live.shape, device=live.device) if mask.dtype == torch.bool else mask.masked_fill(~live, 0.0)


def attention_buffers(
    spec: DecodeAttentionSpec, padding: int = 0, seed: int = 0, device: str = "cpu", window: int | None = None
) -> dict[str, torch.Tensor]:
    """Returns the buffers of an attention; masked keys and values and the output hold NaN."""
    g = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    shape = (spec.batch, spec.kv_heads, spec.slots, spec.head_dim)
    q = torch.randn(spec.batch, spec.heads, spec.head_dim, generator=g, device=device).to(dtype)
    k, v = (torch.randn(shape, generator=g, device=device).to(dtype) for _ in range(2))
    live = live_slots(spec, padding, window, device)
    k, v = (cache.masked_fill(~live[:, None, :, None], float("nan")) for cache in (k, v))
    out = poisoned(q.shape, dtype, device)
    others = mask_buffers(spec, live, g) | sink_buffers(spec, seed, device)
    return {"q": q, "k_cache": k, "v_cache": v, "out": out, **others}


def check_attention(
    spec: DecodeAttentionSpec,
    padding: int = 0,
    seed: int = 0,
    device: str = "cpu",
    run: Run = run_guarded,
    window: int | None = None,
) -> None:
    """Checks attention with slots of the last sequence masked before `padding` and after a window."""
    buffers = attention_buffers(spec, padding, seed, device, window)
    result = run(spec, device=device, **buffers)["out"]
    live = live_slots(spec, padding, window, device)
    q, k, v = buffers["q"], buffers["k_cache"].nan_to_num(), buffers["v_cache"].nan_to_num()
    options = {"scale": spec.scale, "softcap": spec.softcap, "mask": live if spec.mask else None}
    options["sinks"] = buffers.get("sinks")
    expected = reference.attention(q, k, v, added=added_by(buffers, live), **options)
    assert_close(result, expected, v.double().abs().amax((1, 2, 3))[:, None, None].clamp_min(1.0))


def buffers_of_several(
    spec: DecodeAttentionSpec, positions: int, seed: int, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the buffers of attention from several positions, and their slots [B, T, S]; others hold NaN."""
    g = torch.Generator(device).manual_seed(seed)
    dtype, b = getattr(torch, spec.dtype), spec.batch

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, device=device)

    live = rand(spec.mask_rows or b, positions, spec.slots) < rand(1)
    live &= rand(*live.shape[:2], 1) < 0.9  # (some position sees no slot)
    seen = live.expand(b, -1, -1).any(1)
    q = torch.randn(b * positions, spec.heads, spec.head_dim, generator=g, device=device).to(dtype)
    shape = (b, spec.kv_heads, spec.slots, spec.head_dim)
    caches = {name: torch.randn(shape, generator=g, device=device).to(dtype) for name in KV}
    caches = {name: cache.masked_fill(~seen[:, None, :, None], float("nan")) for name, cache in caches.items()}
    counter = torch.tensor([7], dtype=getattr(torch, spec.index_dtype), device=device)
    counters = {"slot": counter} if spec.advance else {}
    out = poisoned(q.shape, dtype, device)
    others = mask_buffers(spec, live, g) | sink_buffers(spec, seed, device) | counters
    return {"q": q, **caches, **others, "out": out}, live


def check_attention_of_several(spec: DecodeAttentionSpec, positions: int, seed: int = 0, device: str = "cpu") -> None:
    """Checks attention from several positions, each with its own slots, and the counter."""
    buffers, live = buffers_of_several(spec, positions, seed, device)
    result = run_guarded(spec, positions, device, **buffers)
    k, v = (buffers[name].nan_to_num() for name in KV)
    seen = live.expand(spec.batch, -1, -1)
    options = {"mask": seen, "added": added_by(buffers, live).expand(seen.shape)}
    options |= {"scale": spec.scale, "softcap": spec.softcap, "sinks": buffers.get("sinks")}
    q = buffers["q"].unflatten(0, (spec.batch, positions))
    expected = reference.cache_attention(q, k, v, **options)
    assert_close(result["out"], expected.flatten(0, 1), v.double().abs().amax().clamp_min(1.0))
    if spec.advance:
        assert int(result["slot"]) == 7 + positions


@dots_in_order()
def check_bits_of_positions(
    spec: DecodeAttentionSpec, positions: int, some: slice, seed: int = 0, device: str = "cpu"
) -> None:
    """Checks that some positions have the same bits alone; slots of the others hold NaN then."""
    buffers, _ = buffers_of_several(spec, positions, seed, device)
    apart = (spec.batch, positions)
    whole = run_guarded(spec, positions, device, **buffers)["out"].unflatten(0, apart)[:, some]
    q, mask = buffers["q"].unflatten(0, apart)[:, some], buffers["mask"][:, some]
    few = {**buffers, "q": q.flatten(0, 1), "mask": mask, "out": poisoned(q.flatten(0, 1).shape, q.dtype, device)}
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 4).any(1)
    for name in KV:
        few[name] = few[name].masked_fill(~seen.expand(spec.batch, -1)[:, None, :, None], float("nan"))
    found = run_guarded(spec, q.shape[1], device, **few)["out"].unflatten(0, q.shape[:2])
    assert torch.equal(found.view(torch.uint8), whole.contiguous().view(torch.uint8))


@dots_in_order()
def check_bits_of_rows(spec: LinearSpec, rows: int, some: slice, seed: int = 0, device: str = "cpu") -> None:
    """Checks that some rows of a kernel for any number of rows have the same bits alone."""
    g = torch.Generator(device).manual_seed(seed)
    dtype, k, n = getattr(torch, spec.dtype), spec.in_features, spec.out_features

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    shapes = {name: buffer.shape for name, buffer in spec.buffers(1).items() if not buffer.workspace}
    fixed = {name: random(*shape) for name, shape in shapes.items() if name not in ("x", "residual", "y")}
    rowwise = {"x": random(rows, spec.x_stride or k)} | ({"residual": random(rows, n)} if spec.residual else {})
    results = []
    for part in (slice(None), some):
        given = {name: tensor[part] for name, tensor in rowwise.items()}
        count = len(given["x"])
        results.append(run_guarded(spec, count, device, **fixed, **given, y=poisoned((count, n), dtype, device))["y"])
    whole, few = results
    assert torch.equal(few.view(torch.uint8), whole[some].contiguous().view(torch.uint8))


def exit_buffers(update: torch.Tensor, residual: torch.Tensor, previous: torch.Tensor) -> dict[str, torch.Tensor]:
    device = str(update.device)
    inputs = {"update": update, "residual": residual, "previous": previous}
    return {
        **inputs,
        "hidden": poisoned(update.shape, update.dtype, device),
        "score": poisoned((1,), torch.float32, device),
    }


def check_exit_score(spec: ExitScoreSpec, nearness: float, seed: int = 0, device: str = "cpu") -> None:
    """Checks hidden state and smallest cosine; `nearness` mixes the hidden state into the previous one."""
    g = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    update, residual, noise = (
        torch.randn(spec.rows, spec.features, generator=g, device=device).to(dtype) for _ in range(3)
    )
    hidden = update.double() + residual.double()
    previous = (nearness * hidden + (1 - nearness) * noise.double()).to(dtype)
    result = run_guarded(spec, device=device, **exit_buffers(update, residual, previous))
    assert_close(result["hidden"], hidden, update.double().abs() + residual.double().abs())
    assert_close(result["score"], reference.row_similarity(result["hidden"], previous).min(), 1.0)


def check_nan_never_exits(spec: ExitScoreSpec, row: int, device: str = "cpu") -> None:
    update, residual = torch.ones(2, spec.rows, spec.features, dtype=getattr(torch, spec.dtype), device=device)
    spoiled = update.clone()
    spoiled[row, -1] = float("nan")
    result = run_guarded(spec, device=device, **exit_buffers(spoiled, residual, update))
    assert result["score"].isnan().all()


def check_kernel(spec: KernelSpec, rows: int, slots: int, device: str) -> None:
    """Checks one kernel of a model's decode step."""
    if isinstance(spec, LinearSpec) and spec.experts:
        spec = dataclasses.replace(spec, experts=min(spec.experts, _EXPERTS))
        check_experts(spec, [row % (spec.experts + 1) for row in range(spec.rows or rows)], device=device)
    elif isinstance(spec, LinearSpec):
        check_linear(spec, rows, device=device)
        if spec.any_width:
            check_bits_of_rows(spec, 16, slice(3, 3 + rows), device=device)
    elif isinstance(spec, KvFillSpec):
        check_kv_fill(dataclasses.replace(spec, positions=1), slots - 1, device=device)
    elif isinstance(spec, DecodeAttentionSpec) and not spec.positions:
        check_attention_of_several(spec, 5, device=device)
        check_attention_of_several(dataclasses.replace(spec, sinks_dtype="bfloat16"), 5, device=device)
        check_bits_of_positions(spec, 5, slice(2, 3), device=device)
    elif isinstance(spec, DecodeAttentionSpec):
        alone = dataclasses.replace(spec, fill=None, advance=False)
        check_attention(dataclasses.replace(alone, mask=False), device=device)
        check_attention(dataclasses.replace(alone, sinks_dtype="bfloat16"), padding=slots // 2, device=device)
        check_attention(alone, padding=slots // 2, device=device)
        for slot in (0, slots - 1, slots):  # the last one lies outside
            check_kv_fill(spec.fill, slot, device=device)
            check_attend(spec, slot, device=device)
    else:
        assert isinstance(spec, ExitScoreSpec), "another family has no check here"
        check_exit_score(spec, 1.0, device=device)
        check_nan_never_exits(spec, rows - 1, device=device)
