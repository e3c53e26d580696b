"""Values that pass between stages: DecoderPlan -> RiverProgram -> Program, or a Refusal.

All are frozen. A `RiverProgram` names values by nodes of the traced graph, which no pass changes; a `Program` by
numbered slots, so that it can be cached, bound to a KV cache and captured without a graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import fx

from river_compile.kernels.quant.layouts import NATIVE_LAYOUT, TRITON_LAYOUT
from river_compile.kernels.quant.mxfp4 import LAYOUT_MXFP4

Size: TypeAlias = int | sympy.Expr  # of symbols that stand for dynamic sizes


@dataclass(frozen=True)
class Refusal:
    """Why a graph is unsupported, for the user."""

    reason: str
    where: str = ""  # a node or module; "" for the whole graph

    def __str__(self) -> str:
        return f"{self.reason} (at {self.where})" if self.where else self.reason


@dataclass(frozen=True)
class KVSlot:
    """One block's KV cache or recurrent state."""

    kind: str  # "static": written in place; "dynamic": returned longer
    writes: tuple[fx.Node, ...]  # nodes that return it, then those that write it; none for a block without a cache
    lengths: tuple[fx.Node, ...] = ()  # integer placeholders, advanced in place: the number of filled slots
    capacity: int | torch.SymInt | None = None  # slots of a static cache filled from the front; None: no limit


@dataclass(frozen=True)
class Block:
    index: int  # from 0
    path: str  # of its module
    # [B, T, D], or several streams: [S, B, T, D] or [B, T, S, D] (`DecoderPlan.token_axis`)
    hidden_in: fx.Node
    hidden_out: fx.Node
    kv: KVSlot


@dataclass(frozen=True)
class DecoderPlan:
    graph: fx.Graph = field(repr=False)
    blocks: tuple[Block, ...]
    # of every node but placeholders and the output: 0 for the embedding stage, 1..L block, L + 1 head
    part_of: dict[fx.Node, int] = field(repr=False)
    query_length: int | torch.SymInt  # tokens of each row
    batch: int | torch.SymInt
    token_axis: int = 1  # of the hidden states

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def cache(self) -> str:
        """Returns "dynamic" if any block returns its cache, else "static"."""
        return "dynamic" if any(block.kv.kind == "dynamic" for block in self.blocks) else "static"

    @property
    def device(self) -> torch.device:
        return self.blocks[0].hidden_in.meta["example_value"].device

    @property
    def is_decode(self) -> bool:
        return isinstance(self.query_length, int) and self.query_length == 1

    @property
    def kind(self) -> str:
        return "decode" if self.is_decode else "prefill"


@dataclass(frozen=True)
class Fingerprint:
    """A digest, equal for segments that compute the same function of their inputs."""

    digest: str
    symbols: tuple[str, ...]  # names of dynamic sizes in order of appearance; equal digests use them alike


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the graph that is compiled and called as one function; compared by identity."""

    kind: str  # "prologue", "block", "twin", "head" or "twin_head"
    depth: int  # its block's number from 1; 0 for the embedding stage, L + 1 for the heads
    graph: fx.Graph = field(repr=False)
    inputs: tuple[fx.Node, ...]  # of the traced graph, in the order of `graph`'s placeholders
    outputs: tuple[fx.Node, ...]  # of the traced graph, in the order of `graph`'s outputs
    # Their placeholders follow the inputs: qweight, scale_zero, the bias if any, and if the inputs are scaled, the
    # norm's parameters or the inverse scale.
    packed: tuple[Matmul, ...] = ()
    takes_vocab_blocks: bool = False  # `vocab_blocks` of `river::linear` follows the packed weights
    has_score: bool = False  # a float32 number follows the outputs: a block's exit score or a head's entropy
    fingerprint: Fingerprint | None = None  # of an optimized program, in which equal segments share a graph

    @property
    def name(self) -> str:
        return segment_name(self.kind, self.depth)

    @property
    def origins(self) -> dict[fx.Node, fx.Node]:
        """Maps placeholders, those of packed weights excepted, to values of the traced graph."""
        return dict(zip(self.graph.find_nodes(op="placeholder"), self.inputs, strict=False))

    def node_of(self, value: fx.Node) -> fx.Node:
        """Return the node of the segment's graph for one of its inputs or outputs."""
        if value in self.outputs:
            return self.graph.output_node().args[0][self.outputs.index(value)]
        return self.graph.find_nodes(op="placeholder")[self.inputs.index(value)]

    def copy(self, kind: str | None = None) -> Segment:
        """Return the segment with a copy of its graph, which a pass may change."""
        graph = fx.Graph(owning_module=self.graph.owning_module)
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, graph=graph, kind=kind or self.kind, fingerprint=None)


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """One matmul with packed weights: a linear, several that share their input, or a stack of experts."""

    # Parameters are numbers of the graph's inputs, so that no graph is kept alive.
    name: str  # module paths of the linears, joined by "|"; the path of a stack's parameter
    weights: tuple[int, ...]  # one for each linear; a stack's one [E, N, K] ([E, K, N])
    biases: tuple[int | None, ...]  # each [N_i]; None for a linear without one
    in_features: int  # K
    out_features: tuple[int, ...]  # N_i of each linear; E * N of a stack
    transposed: bool  # weights are [K, N_i], as GPT-2's Conv1D stores them, instead of [N_i, K]
    group_size: int  # consecutive input features that share a scale and zero-point; 0: lossless
    layout: str  # of the packed weights, as the kernel reads them
    scales_inputs: bool = False  # the inputs are divided by a scale [K] that the packing chooses
    folds: tuple[int, ...] = ()  # norm parameters divided by that scale; none: the inputs are multiplied by its inverse
    experts: int = 0  # E of a stack; 0 for linears

    @property
    def lossless(self) -> bool:
        """Whether unpacking gives the parameters, to the bit; else they have 4 bits."""
        return self.group_size == 0

    @property
    def in_place(self) -> bool:
        """Whether the kernel reads the parameter's own bytes, so that nothing is packed or stored."""
        return self.layout == LAYOUT_MXFP4

    @property
    def has_bias(self) -> bool:
        return any(bias is not None for bias in self.biases)

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (out_features, in_features) merged along the rows, those of all experts too."""
        return sum(self.out_features), self.in_features

    @property
    def parameters(self) -> tuple[int, ...]:
        return tuple(number for number in (*self.weights, *self.biases, *self.folds) if number is not None)


@dataclass(frozen=True)
class KeptLinear:  # a linear of a twin that stays in 16 bits
    name: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """The outcome of a fusion rule in a segment."""

    rule: str
    segment: str
    missed: str = ""  # why it did not match; "" if it applied
    node: str = ""  # where it did not, with the source line


@dataclass(frozen=True)
class RiverProgram:
    """The decoder that passes transform: blocks up to an exit, then twins of the rest, then the head.

    A pass returns another program; it changes no graph of the one it is given.
    """

    plan: DecoderPlan
    returned: tuple[fx.Node, ...]
    prologue: Segment
    blocks: tuple[Segment, ...]
    head: Segment
    twins: tuple[Segment, ...] = ()  # one for each block, with its outputs; none if no token can exit early
    twin_head: Segment | None = None  # for tokens that exited early; None: they use `head`
    candidates: tuple[int, ...] = ()  # exit depths (blocks executed) with a check, ascending
    kept: tuple[KeptLinear, ...] = ()
    fusions: tuple[Fusion, ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(self.plan.graph.find_nodes(op="placeholder"))

    @functools.cached_property
    def slots(self) -> dict[fx.Node, int]:
        """Numbers the values of a run: the graph's inputs in order, then outputs of segments."""
        crossing = [n for s in (self.prologue, *self.blocks, self.head) for n in s.outputs]
        return {node: i for i, node in enumerate([*self.inputs, *crossing])}

    @property
    def segments(self) -> tuple[Segment, ...]:
        heads = (self.head,) if self.twin_head is None else (self.head, self.twin_head)
        return (self.prologue, *self.blocks, *self.twins, *heads)


@dataclass(frozen=True)
class TensorSpec:  # a fake tensor's metadata
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


Example: TypeAlias = TensorSpec | Size | None  # metadata of a value; None: neither ordinary tensor nor integer


@dataclass(frozen=True)
class Source:
    # a parameter or buffer; a field of a cache layer; an argument of the model's forward; a size of one of these
    kind: Literal["model", "cache", "call", "size"]
    name: Any = ""  # its path in the model; the field; the argument, or (argument, key) of a dict
    layer: int = 0  # of the cache


@dataclass(frozen=True)
class Input:
    name: str  # in the user's code
    example: Example
    is_parameter: bool  # a parameter or buffer of a module
    is_fixed: bool  # a parameter, or written in place; only other inputs may be copied into buffers
    source: Source | None = None  # None: unknown


@dataclass(frozen=True)
class Lowering:
    """How a `RiverProgram` becomes a `Program`."""

    compiler: Literal["inductor", "eager"]  # "eager": operator by operator
    layout: str | None  # of the 4-bit weights; None: nothing is packed, twins read the 16-bit weights
    fuse: bool  # whether fused kernels replace operators

    @property
    def native(self) -> bool:
        """True for the C++ kernels."""
        return self.layout == NATIVE_LAYOUT

    @property
    def dense_layout(self) -> str:
        """The layout of `river::linear` with 16-bit weights."""
        return "dense" if self.native else TRITON_LAYOUT


@dataclass(frozen=True, eq=False)
class Code:
    """A lowered function, shared by equal segments."""

    module: fx.GraphModule = field(repr=False)  # operators of one lowering, without example values
    # "native": C++ kernels and views only; "operators": called one by one; "inductor": compiled
    runs_by: Literal["native", "operators", "inductor"]
    fingerprint: Fingerprint  # of the segment before lowering


@dataclass(frozen=True, eq=False)
class SegmentSpec:
    """A `Segment` over numbered slots; compared by identity."""

    kind: str
    depth: int
    code: Code
    inputs: tuple[int, ...]  # slots, in the order of the code's placeholders
    outputs: tuple[int, ...]
    packed: tuple[Matmul, ...] = ()
    takes_vocab_blocks: bool = False
    has_score: bool = False
    obstacle: Refusal | None = None  # why it cannot be captured; None if it can
    experts: tuple[tuple[int, int], ...] = ()  # stacks of experts: number of the placeholder, experts a token reads

    @property
    def name(self) -> str:
        return segment_name(self.kind, self.depth)


@dataclass(frozen=True)
class CacheRoom:
    """Slots that tell the free room of a static KV cache."""

    length: int  # slot of its filled length
    size: int | None  # its capacity; None: that of dimension `dim` of the keys
    keys: int = 0  # slot of a tensor of keys
    dim: int = 0


@dataclass(frozen=True)
class LastToken:
    """Slots that restrict the head to the last token."""

    hidden: int  # slot of the last hidden states
    size: int  # slot of the number of tokens
    axis: int  # of the hidden states, which counts tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A `RiverProgram` over numbered slots: its inputs, outputs of segments, one score."""

    kind: Literal["decode", "prefill"]  # one token of each row, or several
    cache: Literal["static", "dynamic"]
    device: torch.device  # of the hidden states
    dtype: torch.dtype  # of the hidden states
    inputs: tuple[Input, ...]  # in the order of the traced graph
    values: tuple[Example, ...]  # of the slots after the inputs, the last one (the score) excepted
    hints: tuple[tuple[sympy.Symbol, int], ...]  # dynamic sizes at trace time
    conditions: tuple[sympy.Basic, ...] = ()  # assumed of dynamic sizes
    prologue: SegmentSpec
    blocks: tuple[SegmentSpec, ...]
    head: SegmentSpec
    twins: tuple[SegmentSpec, ...]
    twin_head: SegmentSpec | None
    candidates: tuple[int, ...]
    kept: tuple[KeptLinear, ...]
    fusions: tuple[Fusion, ...]
    returned: tuple[int, ...]  # slots
    keys: tuple[int | None, int | None]  # slots of one KV cache tensor before and after a forward; identify a sequence
    batch: Size
    tokens: Size  # of each row
    capacity: CacheRoom | None  # of a static cache filled from the front; None: no limit
    last_token: LastToken | None  # None: the heads cannot be restricted
    not_captured: str | None  # why no segment can be captured; None if some can
    block_paths: tuple[str, ...]  # of modules
    matrices: tuple[str, ...]  # names of all linears and stacks of experts
    native: bool  # uses the C++ kernels
    width_matters: str  # why a token's bits may depend on the number of tokens in a forward; "" if they do not

    @functools.cached_property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @functools.cached_property
    def is_decode(self) -> bool:
        return self.kind == "decode"

    @property
    def segments(self) -> tuple[SegmentSpec, ...]:
        heads = (self.head,) if self.twin_head is None else (self.head, self.twin_head)
        return (self.prologue, *self.blocks, *self.twins, *heads)

    @functools.cached_property
    def hidden(self) -> int | None:
        """The slot of the last hidden states [B, T, D], before the final norm; None if the head reads other values."""
        written = {slot for block in self.blocks for slot in block.outputs}
        read = [slot for slot in self.head.inputs if slot in written]
        if len(read) != 1 or read[0] not in self.blocks[-1].outputs:
            return None
        example = self.examples[read[0]]
        return read[0] if isinstance(example, TensorSpec) and len(example.shape) == 3 else None

    @functools.cached_property
    def examples(self) -> tuple[Example, ...]:
        return (*(value.example for value in self.inputs), *self.values)

    def is_parameter(self, slot: int) -> bool:
        return slot < len(self.inputs) and self.inputs[slot].is_parameter

    def size_of(self, size: Size, args: Any) -> int | None:
        """Evaluate a size for the inputs `args`; None if they do not determine it."""
        if isinstance(size, int):
            return size
        numbers = {example: i for i, example in enumerate(self.examples[: len(self.inputs)]) if _is_symbol(example)}
        if not size.free_symbols <= numbers.keys():
            return None
        return int(size.xreplace({symbol: sympy.Integer(args[numbers[symbol]]) for symbol in size.free_symbols}))


def _is_symbol(example: Example) -> bool:
    return isinstance(example, sympy.Symbol)


def segment_name(kind: str, depth: int) -> str:
    """Return the kind, with the depth if there are several: "head", "block_3"."""
    return kind if kind in ("prologue", "head", "twin_head") else f"{kind}_{depth}"
