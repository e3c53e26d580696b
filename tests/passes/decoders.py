"""Decoders as Dynamo traces them, without a model and without Dynamo, in the spellings that models use."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx

from river_compile.passes.decoder import find_decoder
from river_compile.passes.normalize import normalized
from river_compile.passes.program import RiverProgram
from river_compile.passes.segments import split_segments
from tests.passes.graphs import GraphBuilder

WIDTH, HEADS, KV_HEADS, DIM, SLOTS, MLP = 32, 4, 2, 16, 6, 64
FILLED = 3


@dataclass(frozen=True)
class Spelling:
    """How a decoder is written."""

    blocks: int = 2
    batch: int = 2
    norm: str = "rms"  # before attention and MLP; or "rms_plus_one", "layer", "rms_called", "none"
    sandwich: bool = False  # another norm after attention and MLP, before the additions
    parallel: bool = False  # attention and MLP read the same input
    projections: str = "separate"  # or "fused" (q|k|v, gate|up), "conv1d" (stored transposed), "matmul" with weight.T
    bias: str = ""  # of "qkv", or of "all" linears, as "conv1d" has anyway
    head_norm: bool = False  # queries and keys are normalized per head
    rotation: str = "half"  # or "partial", "interleaved", "by_halves" (with one angle for each pair), "none"
    query_scale: bool = False  # the rotated query is scaled before the cache is written
    cache: str = "counted"  # or "rolled" (a full sliding window), "grown"
    mask: str = "bool"  # or "where", "row" (one row for all sequences), "bias" (any numbers), "heads", "none"
    attention: str = "sdpa"  # or "written", with a soft cap, or "sinks"
    activation: str = "silu"  # or "gelu", "gelu_tanh", "gelu_written", "relu", "tanh"
    gated: bool = True  # the MLP has a gate
    up_first: bool = False  # the gate is the second half of gate|up
    residual: float = 1.0  # factor before the additions
    between: bool = False  # an operation between the blocks that no module contains
    return_hidden: bool = False  # the hidden state after every block is returned too

    @property
    def fused(self) -> bool:
        return self.projections == "fused"


def spellings(most_blocks: int = 5) -> st.SearchStrategy[Spelling]:
    """Returns a strategy over structures of at least two blocks; fusion/test_rules.py has more spellings of a block."""
    return st.builds(
        Spelling,
        blocks=st.integers(2, most_blocks),
        batch=st.integers(1, 3),
        norm=st.sampled_from(["rms", "layer", "none"]),
        parallel=st.booleans(),
        projections=st.sampled_from(["separate", "fused", "conv1d", "matmul"]),
        bias=st.sampled_from(["", "all"]),
        cache=st.sampled_from(["counted", "grown"]),
        activation=st.sampled_from(["silu", "gelu"]),
        gated=st.booleans(),
        between=st.booleans(),
        return_hidden=st.booleans(),
    )


def decoder(how: Spelling, seed: int = 0) -> tuple[fx.GraphModule, list[Tensor]]:
    """Returns a decoder's graph for one token per row, and real inputs."""
    return _Decoder(how, seed).build()


def planned(how: Spelling, seed: int = 0) -> RiverProgram:
    """Returns a decoder as the passes' input."""
    graph_module, _ = decoder(how, seed)
    return split_segments(find_decoder(normalized(graph_module)))


def turned_by_halves(
    b: GraphBuilder, x: fx.Node, cos: fx.Node, sin: fx.Node, order: tuple[int, int] = (0, 1)
) -> fx.Node:
    """Returns x's heads, rotated half by half (gpt-oss)."""
    halves = b.call("chunk", x, 2, dim=-1)
    first, second = (b.call(operator.getitem, halves, i) for i in order)
    turned = b.call(operator.sub, b.call(operator.mul, first, cos), b.call(operator.mul, second, sin))
    rest = b.call(operator.add, b.call(operator.mul, second, cos), b.call(operator.mul, first, sin))
    return b.call(torch.cat, (turned, rest), dim=-1)


def weights_with_sinks(
    b: GraphBuilder, scores: fx.Node, sinks: fx.Node, shifted: bool = True, taken: slice = slice(None, -1)
) -> fx.Node:
    """Returns softmax weights ``[B, H, T, S]`` of the scores and a sink for each head, which is left out again."""
    batch, _, positions, _ = scores.meta["example_value"].shape
    spread = b.call("expand", b.call("reshape", sinks, 1, -1, 1, 1), batch, -1, positions, -1)
    together = b.call(torch.cat, [scores, spread], dim=-1)
    if shifted:
        largest = b.call(operator.getitem, b.call("max", together, dim=-1, keepdim=True), 0)
        together = b.call(operator.sub, together, largest)
    weights = b.call(F.softmax, together, dim=-1, dtype=scores.meta["example_value"].dtype)
    return b.call(operator.getitem, weights, (Ellipsis, taken))


class _Decoder:
    def __init__(self, how: Spelling, seed: int) -> None:
        self.how = how
        self.b = GraphBuilder(seed)

    def build(self) -> tuple[fx.GraphModule, list[Tensor]]:
        b, how = self.b, self.how
        ids = b.placeholder("ids", torch.randint(0, 16, (how.batch, 1), generator=b.generator))
        padding = torch.ones(how.batch, SLOTS, dtype=torch.bool)
        padding[-1, 0] = how.batch == 1
        self.padding = b.placeholder("padding", padding)
        self.scores = b.placeholder("scores", b.randn(how.batch, 1, 1, SLOTS))
        self.angles = b.placeholder(
            "angles", b.randn(how.batch, 1, DIM // 2 if how.rotation in ("partial", "by_halves") else DIM)
        )
        embedding = b.parameter("embedding", 16, WIDTH)
        weights = [self._declare(i) for i in range(how.blocks)]
        head = b.parameter("head", 16, WIDTH)
        with b.module("L['self'].model"):
            hidden = b.call(F.embedding, ids, embedding)
            self.cos, self.sin = b.call(torch.cos, self.angles), b.call(torch.sin, self.angles)
            self.mask = self._mask(weights[0])
        returned, states = [], []
        for i, w in enumerate(weights):
            with b.module("L['self'].model"), b.module(f"L['self'].model.layers.{i}"):
                hidden = self._block(w, hidden, returned)
            states.append(hidden)
            if how.between and i + 1 < how.blocks:
                with b.module("L['self'].model"):
                    hidden = b.call(operator.mul, hidden, 1.25)
        logits = b.call(F.linear, self._norm(weights[0]["norm"], hidden), head, None)
        return b.finish([*returned, *(states if how.return_hidden else []), logits]), b.values

    def _declare(self, i: int) -> dict[str, fx.Node]:
        b, how = self.b, self.how
        q, kv = HEADS * DIM, KV_HEADS * DIM
        sizes = {"qkv": (q + 2 * kv, WIDTH)} if how.fused else {"q": (q, WIDTH), "k": (kv, WIDTH), "v": (kv, WIDTH)}
        sizes |= {"gate_up": (2 * MLP, WIDTH)} if how.fused and how.gated else {"up": (MLP, WIDTH)}
        sizes |= {"gate": (MLP, WIDTH)} if how.gated and not how.fused else {}
        sizes |= {"o": (WIDTH, q), "down": (WIDTH, MLP)}
        turn = -1 if how.projections == "conv1d" else 1
        w = {name: b.parameter(f"b{i}_{name}", *size[::turn]) for name, size in sizes.items()}
        of_all = how.bias == "all" or how.projections == "conv1d"
        biased = [n for n in sizes if of_all or (how.bias and n in ("q", "k", "v", "qkv"))]
        w |= {f"{n}_bias": b.parameter(f"b{i}_{n}_bias", sizes[n][0]) for n in biased}
        w |= {name: b.parameter(f"b{i}_{name}", WIDTH) for name in ("norm", "norm_bias", "norm_2", "norm_3", "norm_4")}
        w |= {name: b.parameter(f"b{i}_{name}", DIM) for name in ("q_norm", "k_norm")}
        w |= {"sinks": b.parameter(f"b{i}_sinks", HEADS)}
        slots = FILLED if how.cache == "grown" else SLOTS
        w |= {
            name: b.placeholder(f"b{i}_{name}", b.randn(how.batch, KV_HEADS, slots, DIM)) for name in ("keys", "values")
        }
        filled = SLOTS - 1 if how.cache == "rolled" else FILLED
        return w | {"length": b.placeholder(f"b{i}_length", torch.tensor(filled))}

    def _mask(self, w: dict[str, fx.Node]) -> fx.Node | None:
        b, kind = self.b, self.how.mask
        if kind == "none" or self.how.cache == "grown":
            return None
        past = b.call(operator.le, b.call(torch.arange, SLOTS), w["length"])
        if kind == "row":
            return b.call("view", past, (1, 1, 1, SLOTS))
        seen = b.call("view", b.call(operator.and_, past, self.padding), (self.how.batch, 1, 1, SLOTS))
        if kind == "heads":
            return b.call("expand", seen, self.how.batch, HEADS, 1, SLOTS)
        if kind == "where":
            return b.call(torch.where, seen, 0.0, torch.finfo(torch.float32).min)
        if kind == "bias":
            return b.call(torch.where, seen, self.scores, torch.finfo(torch.float32).min)
        return seen

    def _block(self, w: dict[str, fx.Node], hidden: fx.Node, returned: list[fx.Node]) -> fx.Node:
        b, how = self.b, self.how
        normed = self._norm(w["norm"], hidden, w["norm_bias"])
        with b.module("attention"):
            attended = self._linear(w, "o", self._attention(w, normed, returned))
        attended = self._behind(w["norm_3"], attended)
        if how.parallel:
            mlp = self._mlp(w, normed)
            return b.call(operator.add, b.call(operator.add, attended, mlp), hidden)
        middle = b.call(operator.add, hidden, attended)
        mlp = self._behind(w["norm_4"], self._mlp(w, self._norm(w["norm_2"], middle, w["norm_bias"])))
        return b.call(operator.add, middle, mlp)

    def _linear(self, w: dict[str, fx.Node], name: str, x: fx.Node) -> fx.Node:
        b, bias = self.b, w.get(f"{name}_bias")
        if self.how.projections == "conv1d":
            features, out_features = w[name].meta["example_value"].shape
            y = b.call(torch.addmm, bias, b.call("view", x, -1, features), w[name])
            return b.call("view", y, (self.how.batch, 1, out_features))
        if self.how.projections == "matmul":
            y = b.call(operator.matmul, x, b.call(getattr, w[name], "T"))
            return y if bias is None else b.call(operator.add, y, bias)
        return b.call(F.linear, x, w[name], bias)

    def _behind(self, weight: fx.Node, x: fx.Node) -> fx.Node:
        x = self._norm(weight, x) if self.how.sandwich else self.b.call(F.dropout, x, 0.1, False)
        return x if self.how.residual == 1.0 else self.b.call(operator.mul, x, self.how.residual)

    def _norm(self, weight: fx.Node, x: fx.Node, bias: fx.Node | None = None, kind: str | None = None) -> fx.Node:
        b, kind = self.b, kind or self.how.norm
        size = (x.meta["example_value"].shape[-1],)
        if kind == "none":
            return x
        if kind == "layer":
            return b.call(F.layer_norm, x, size, weight, bias, 1e-5)
        if kind == "rms_called":
            return b.call(F.rms_norm, x, size, weight, 1e-6)
        wide = b.call("to", x, torch.float32)
        mean = b.call("mean", b.call("pow", wide, 2), -1, keepdim=True)
        y = b.call(operator.mul, wide, b.call(torch.rsqrt, b.call(operator.add, mean, 1e-6)))
        if kind == "rms_plus_one":
            return b.call(operator.mul, y, b.call(operator.add, 1.0, b.call("float", weight)))
        return b.call(operator.mul, weight, y)

    def _attention(self, w: dict[str, fx.Node], x: fx.Node, returned: list[fx.Node]) -> fx.Node:
        b, how = self.b, self.how
        if how.fused:
            whole = self._linear(w, "qkv", x)
            parts = b.call(torch.split, whole, [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
            q, k, v = (b.call(operator.getitem, parts, i) for i in range(3))
        else:
            q, k, v = (self._linear(w, n, x) for n in "qkv")
        q, k, v = (b.call("view", y, (how.batch, 1, -1, DIM)) for y in (q, k, v))
        if how.head_norm:
            q, k = self._norm(w["q_norm"], q, kind="rms"), self._norm(w["k_norm"], k, kind="rms")
        q, k, v = (b.call("transpose", y, 1, 2) for y in (q, k, v))
        cos, sin = b.call("unsqueeze", self.cos, 1), b.call("unsqueeze", self.sin, 1)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        if how.query_scale:
            q = b.call(operator.mul, q, 1.5)
        keys, values = self._fill(w, k, v, returned)
        out = self._attend(q, keys, values, w["sinks"])
        return b.call("reshape", b.call("transpose", out, 1, 2), (how.batch, 1, HEADS * DIM))

    def _rotate(self, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
        b, kind = self.b, self.how.rotation
        if kind == "none":
            return x
        if kind == "partial":
            half = DIM // 2
            first, rest = (b.call(operator.getitem, x, (Ellipsis, s)) for s in (slice(None, half), slice(half, None)))
            return b.call(torch.cat, (self._turn(first, cos, sin, half), rest), dim=-1)
        return self._turn(x, cos, sin, DIM)

    def _turn(self, x: fx.Node, cos: fx.Node, sin: fx.Node, features: int) -> fx.Node:
        b = self.b
        if self.how.rotation == "by_halves":
            return turned_by_halves(b, x, cos, sin)
        if self.how.rotation == "interleaved":
            even, odd = (b.call(operator.getitem, x, (Ellipsis, slice(start, None, 2))) for start in (0, 1))
            turned = b.call("flatten", b.call(torch.stack, (b.call(operator.neg, odd), even), dim=-1), -2)
        else:
            first, second = (
                b.call(operator.getitem, x, (Ellipsis, s))
                for s in (slice(None, features // 2), slice(features // 2, None))
            )
            turned = b.call(torch.cat, (b.call(operator.neg, second), first), dim=-1)
        return b.call(operator.add, b.call(operator.mul, x, cos), b.call(operator.mul, turned, sin))

    def _fill(self, w: dict[str, fx.Node], k: fx.Node, v: fx.Node, returned: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        b, how = self.b, self.how
        if how.cache == "grown":
            keys, values = b.call(torch.cat, [w["keys"], k], -2), b.call(torch.cat, [w["values"], v], -2)
            returned += [keys, values]
            return keys, values
        if how.cache == "rolled":
            for cache, entry in ((w["keys"], k), (w["values"], v)):
                new = b.call("roll", cache, -1, dims=-2)
                last = b.call(torch.tensor, [-1])
                b.call(operator.setitem, new, (slice(None), slice(None), last), entry)
                b.call("copy_", cache, new)
            return w["keys"], w["values"]
        position = b.call(operator.add, b.call(torch.arange, 1), w["length"])
        b.call("add_", w["length"], 1)
        b.call("index_copy_", w["keys"], 2, position, k)
        b.call("index_copy_", w["values"], 2, position, v)
        return w["keys"], w["values"]

    def _attend(self, q: fx.Node, keys: fx.Node, values: fx.Node, sinks: fx.Node) -> fx.Node:
        b, how = self.b, self.how
        slots, groups = keys.meta["example_value"].shape[2], HEADS // KV_HEADS
        every = slice(None)

        def repeated(x: fx.Node) -> fx.Node:
            x = b.call(operator.getitem, x, (every, every, None, every, every))
            x = b.call("expand", x, how.batch, KV_HEADS, groups, slots, DIM)
            return b.call("reshape", x, how.batch, HEADS, slots, DIM)

        keys, values = repeated(keys), repeated(values)
        if how.attention == "sdpa":
            return b.call(F.scaled_dot_product_attention, q, keys, values, attn_mask=self.mask, scale=0.3)
        scores = b.call(operator.mul, b.call(torch.matmul, q, b.call("transpose", keys, 2, 3)), 0.3)
        if how.attention == "written":
            scores = b.call(operator.mul, b.call(torch.tanh, b.call(operator.truediv, scores, 2.0)), 2.0)
        scores = scores if self.mask is None else b.call(operator.add, scores, self.mask)
        if how.attention == "sinks":
            return b.call(torch.matmul, weights_with_sinks(b, scores, sinks), values)
        return b.call(torch.matmul, b.call(F.softmax, scores, dim=-1), values)

    def _mlp(self, w: dict[str, fx.Node], x: fx.Node) -> fx.Node:
        b, how = self.b, self.how
        with b.module("mlp"):
            if how.gated and how.fused:
                parts = b.call("chunk", self._linear(w, "gate_up", x), 2, dim=-1)
                gate, up = (b.call(operator.getitem, parts, i) for i in (range(2), (1, 0))[how.up_first])
            elif how.gated:
                pair = {n: self._linear(w, n, x) for n in (("gate", "up"), ("up", "gate"))[how.up_first]}
                gate, up = pair["gate"], pair["up"]
            else:
                gate, up = self._linear(w, "up", x), None
            y = self._activate(gate)
            y = y if up is None else b.call(operator.mul, y, up)
            return self._linear(w, "down", y)

    def _activate(self, x: fx.Node) -> fx.Node:
        b, kind = self.b, self.how.activation
        if kind == "gelu_tanh":
            return b.call(F.gelu, x, approximate="tanh")
        if kind != "gelu_written":
            return b.call({"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}[kind], x)
        cubic = b.call(operator.add, x, b.call(operator.mul, 0.044715, b.call(torch.pow, x, 3.0)))
        inner = b.call(torch.tanh, b.call(operator.mul, math.sqrt(2 / math.pi), cubic))
        return b.call(operator.mul, b.call(operator.mul, 0.5, x), b.call(operator.add, 1.0, inner))
