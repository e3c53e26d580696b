"""The values that pass between stages: DecoderPlan -> RiverProgram -> Program, and a Refusal where there is none.

All are frozen. Up to `RiverProgram` values are named by the nodes of the traced graph, which no pass changes. In a
`Program` they are numbered slots: it can be stored, bound to a KV cache and captured without a look at a graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import fx

Size: TypeAlias = int | sympy.Expr  # of symbols that stand for dynamic sizes


@dataclass(frozen=True)
class Refusal:
    """Why a graph is not rewritten, for the user, and the node or module that this is about (the whole graph: "")."""

    reason: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.reason} (at {self.where})" if self.where else self.reason


@dataclass(frozen=True)
class KVSlot:
    """One block's cache: written in place ("static"), or returned longer ("dynamic").

    Attributes:
        writes: the nodes that write or return keys and values, or the state of a recurrence or a convolution; none
            for a block that keeps nothing. Those that return something come first.
        lengths: integer placeholders that the block advances in place, the number of filled slots.
        capacity: slots of a static cache that is filled from the front, None where no limit applies. It is dynamic
            where Dynamo has seen caches of several sizes.
    """

    kind: str
    writes: tuple[fx.Node, ...]
    lengths: tuple[fx.Node, ...] = ()
    capacity: int | torch.SymInt | None = None


@dataclass(frozen=True)
class Block:
    """One decoder block: its 0-based index, its module path, and the hidden states in and out of it.

    Those are ``[B, T, D]``, or several streams: ``[S, B, T, D]`` or ``[B, T, S, D]`` (`DecoderPlan.token_axis`).
    """

    index: int
    path: str
    hidden_in: fx.Node
    hidden_out: fx.Node
    kv: KVSlot


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder found in a traced graph, for `batch` rows of `query_length` tokens, the `token_axis` of hidden states.

    `part_of` has, for each node but placeholders and the output: 0 prologue, 1..L block, L + 1 head.
    """

    graph: fx.Graph = field(repr=False)
    blocks: tuple[Block, ...]
    part_of: dict[fx.Node, int] = field(repr=False)
    query_length: int | torch.SymInt
    batch: int | torch.SymInt
    token_axis: int = 1

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def cache(self) -> str:
        """The kind of the blocks' caches: "dynamic" if any block returns its cache, else "static"."""
        return "dynamic" if any(block.kv.kind == "dynamic" for block in self.blocks) else "static"

    @property
    def device(self) -> torch.device:
        return self.blocks[0].hidden_in.meta["example_value"].device

    @property
    def is_decode(self) -> bool:
        """True for a graph that advances every row by exactly one token."""
        return isinstance(self.query_length, int) and self.query_length == 1

    @property
    def kind(self) -> str:
        return "decode" if self.is_decode else "prefill"


@dataclass(frozen=True)
class Fingerprint:
    """A digest that is equal for segments which compute the same function of their inputs.

    `symbols` are the names of the dynamic sizes in order of appearance; equal digests use them alike.
    """

    digest: str
    symbols: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of the graph that is compiled and called as one function. Two segments are equal only if they are one.

    Attributes:
        kind: "prologue", "block", "twin", "head" or "river_head".
        depth: the block that it is, or stands for, from 1; 0 for the prologue, L + 1 for the heads.
        inputs, outputs: nodes of the traced graph, in the order of the placeholders and outputs of the segment's own.
        packed: the twin's linears whose 4-bit weights follow the inputs: qweight, scale_zero, with a bias the bias, and
            where the inputs are scaled the norm's parameters or the inverse scale.
        chooses_logits: after the packed weights comes the list of wanted logits, `wanted` of `river::linear`.
        has_score: a float32 number follows the outputs: a block's exit score, or a head's entropy.
        fingerprint: of a rewritten program, in which segments of equal ones have one graph.
    """

    kind: str
    depth: int
    graph: fx.Graph = field(repr=False)
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    packed: tuple[Matmul, ...] = ()
    chooses_logits: bool = False
    has_score: bool = False
    fingerprint: Fingerprint | None = None

    @property
    def name(self) -> str:
        """The kind, with the number of the block where there are several: "block_3"."""
        return segment_name(self.kind, self.depth)

    @property
    def origins(self) -> dict[fx.Node, fx.Node]:
        """The value of the traced graph that each placeholder stands for (those of packed weights stand for none)."""
        return dict(zip(self.graph.find_nodes(op="placeholder"), self.inputs, strict=False))

    def node_of(self, value: fx.Node) -> fx.Node:
        """Returns the node of the segment's own graph that holds one of its inputs or outputs."""
        if value in self.outputs:
            return self.graph.output_node().args[0][self.outputs.index(value)]
        return self.graph.find_nodes(op="placeholder")[self.inputs.index(value)]

    def copy(self, kind: str | None = None) -> Segment:
        """Returns the segment with a graph of its own, which a pass may change."""
        graph = fx.Graph(owning_module=self.graph.owning_module)
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, graph=graph, kind=kind or self.kind, fingerprint=None)


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """One matmul with packed weights: a linear layer, several that share their input, or a stack of experts.

    Those of twins have 4 bits, those of the backbone (`lossless`) the values of their parameters.

    Linears are merged along the rows, and so are, to quantize them, the matrices of a stack. Parameters are numbers of
    the graph's inputs, so that it keeps no graph alive.
    """

    name: str  # module paths of the linears, joined by "|"; the path of a stack's parameter
    weights: tuple[int, ...]  # one for each linear; a stack's one [E, N, K] ([E, K, N])
    biases: tuple[int | None, ...]  # each [N_i], None for a linear without one
    in_features: int  # K
    out_features: tuple[int, ...]  # N_i of each matrix
    transposed: bool  # weights are [K, N_i], as GPT-2's Conv1D stores them, instead of [N_i, K]
    group_size: int  # consecutive input features that share a scale and a zero; 0: lossless
    layout: str  # how its kernel wants it packed
    scales_inputs: bool = False  # the inputs are divided by a scale [K] that the packing chooses
    folds: tuple[int, ...] = ()  # the norm's parameters that take that scale up; without, inputs times its inverse
    experts: int = 0  # E, the matrices of a stack; 0 for linears

    @property
    def lossless(self) -> bool:
        """Whether the packed weights are those of the parameters, to the bit."""
        return self.group_size == 0

    @property
    def has_bias(self) -> bool:
        return any(bias is not None for bias in self.biases)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the merged matrix; the experts of a stack lie one below the other."""
        return sum(self.out_features), self.in_features

    @property
    def parameters(self) -> tuple[int, ...]:
        """The numbers of all its parameters."""
        return tuple(number for number in (*self.weights, *self.biases, *self.folds) if number is not None)


@dataclass(frozen=True)
class KeptLinear:
    """A matmul of a twin that stays in 16 bits, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """The outcome of a fusion rule in a segment: why it missed ("" if it applied), at which node and source line."""

    rule: str
    segment: str
    missed: str = ""
    node: str = ""


@dataclass(frozen=True)
class RiverProgram:
    """The rewritten decoder: run blocks until an exit, then the twins of the rest, then the head.

    A value: a pass returns another program and leaves this one, with all its graphs, as it is.

    Attributes:
        twins: what a token that left runs for each block, with the block's outputs; none where no token can leave.
        river_head: the head of tokens that left early, None where they use `head`.
        candidates: exit depths (blocks executed) after which a check stands, ascending.
    """

    plan: DecoderPlan
    returned: tuple[fx.Node, ...]
    prologue: Segment
    blocks: tuple[Segment, ...]
    head: Segment
    twins: tuple[Segment, ...] = ()
    river_head: Segment | None = None
    candidates: tuple[int, ...] = ()
    kept: tuple[KeptLinear, ...] = ()
    fusions: tuple[Fusion, ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The graph's inputs, in order."""
        return tuple(self.plan.graph.find_nodes(op="placeholder"))

    @functools.cached_property
    def slots(self) -> dict[fx.Node, int]:
        """Numbers a run's slots: the graph's inputs in order, then values that cross segments' borders."""
        crossing = [n for s in (self.prologue, *self.blocks, self.head) for n in s.outputs]
        return {node: i for i, node in enumerate([*self.inputs, *crossing])}

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments: prologue, blocks, twins, heads."""
        heads = (self.head,) if self.river_head is None else (self.head, self.river_head)
        return (self.prologue, *self.blocks, *self.twins, *heads)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is not there yet."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


Example: TypeAlias = TensorSpec | Size | None  # what a value is like; None: like nothing that can be written down


@dataclass(frozen=True)
class Source:
    """Where an input of a program comes from.

    Attributes:
        kind: "model" (a parameter or buffer), "cache" (a field of a layer), "call" (an argument of the model's
            forward), or "size" (of one of these).
        name: its path in the model; the field; the argument, with its key where that is a dict (a pair then).
        layer: of the cache.
    """

    kind: Literal["model", "cache", "call", "size"]
    name: Any = ""
    layer: int = 0


@dataclass(frozen=True)
class Input:
    """One input of a program.

    Attributes:
        name: how the user's code calls it.
        example: what it is like.
        is_parameter: it is a parameter or buffer of a module.
        is_fixed: its memory is the caller's: a parameter, or what the program writes in place. All others may be copied
            into buffers.
        source: where it comes from; None where that is not known.
    """

    name: str
    example: Example
    is_parameter: bool
    is_fixed: bool
    source: Source | None = None


@dataclass(frozen=True, eq=False)
class Code:
    """What segments compute that are the same function.

    Attributes:
        module: a graph of operators of one lowering, whose nodes know no examples.
        runs_by: "native" where all its operators are the C++ kernels' or views, "operators" where it runs operator by
            operator, "inductor" where that compiles it.
        fingerprint: of the segment before it was lowered.
    """

    module: fx.GraphModule = field(repr=False)
    runs_by: Literal["native", "operators", "inductor"]
    fingerprint: Fingerprint


@dataclass(frozen=True, eq=False)
class SegmentSpec:
    """A segment of a program; two are equal only if they are one.

    Attributes:
        kind, depth, packed, chooses_logits, has_score: as in :class:`Segment`.
        inputs, outputs: slots, in the order of its code's placeholders and outputs.
        obstacle: why it cannot be captured, None where it can.
        experts: how many matrices a token reads of the stacks of experts among the placeholders, by their places.
    """

    kind: str
    depth: int
    code: Code
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    packed: tuple[Matmul, ...] = ()
    chooses_logits: bool = False
    has_score: bool = False
    obstacle: Refusal | None = None
    experts: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """The kind, with the number of the block where there are several: "block_3"."""
        return segment_name(self.kind, self.depth)


@dataclass(frozen=True)
class CacheRoom:
    """Where the room of a static cache is read: the slot of its filled length, and its size or that of a dimension."""

    length: int
    size: int | None
    keys: int = 0  # the slot of a tensor of keys, and the dimension that counts its slots
    dim: int = 0


@dataclass(frozen=True)
class LastToken:
    """Slots that restrict the head to the last token: of hidden states, whose `axis` counts tokens, of their number."""

    hidden: int
    size: int
    axis: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A rewritten decoder whose values are numbered slots: its inputs, what crosses segments' borders, one score.

    Attributes:
        kind: "decode" (one token of each row) or "prefill" (several).
        cache: "static" or "dynamic".
        device: of the hidden states.
        dtype: of the hidden states.
        inputs: in the order of the traced graph.
        values: what the other slots hold, the last one (the score) excepted.
        hints: what dynamic sizes were when they were traced.
        conditions: what is assumed about dynamic sizes.
        prologue, blocks, head, twins, river_head, candidates, kept, fusions: as in :class:`RiverProgram`.
        returned: slots of what a pass returns.
        logits: which of those are the logits, None where that is not known.
        keys: slots of a tensor of the KV cache before a pass, an input, and after it; they tell sequences apart.
        batch, tokens: rows, and tokens of each row.
        capacity: of a static cache that is filled from the front; None where no limit applies.
        last_token: None where the heads cannot be restricted.
        not_captured: why no segment can be captured, None where some can.
        block_paths: module paths of the blocks.
        matrices: names of all matmuls of which the model can have twins.
        native: whether its kernels are those in C++.
        width_matters: why a token's bits may depend on how many run with it through the backbone; empty if they do not.
    """

    kind: Literal["decode", "prefill"]
    cache: Literal["static", "dynamic"]
    device: torch.device
    dtype: torch.dtype
    inputs: tuple[Input, ...]
    values: tuple[Example, ...]
    hints: tuple[tuple[sympy.Symbol, int], ...]
    conditions: tuple[sympy.Basic, ...] = ()
    prologue: SegmentSpec
    blocks: tuple[SegmentSpec, ...]
    head: SegmentSpec
    twins: tuple[SegmentSpec, ...]
    river_head: SegmentSpec | None
    candidates: tuple[int, ...]
    kept: tuple[KeptLinear, ...]
    fusions: tuple[Fusion, ...]
    returned: tuple[int, ...]
    logits: int | None = None
    keys: tuple[int | None, int | None]
    batch: Size
    tokens: Size
    capacity: CacheRoom | None
    last_token: LastToken | None
    not_captured: str | None
    block_paths: tuple[str, ...]
    matrices: tuple[str, ...]
    native: bool
    width_matters: str

    @functools.cached_property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @functools.cached_property
    def is_decode(self) -> bool:
        return self.kind == "decode"

    @property
    def segments(self) -> tuple[SegmentSpec, ...]:
        """All segments: prologue, blocks, twins, heads."""
        heads = (self.head,) if self.river_head is None else (self.head, self.river_head)
        return (self.prologue, *self.blocks, *self.twins, *heads)

    @functools.cached_property
    def examples(self) -> tuple[Example, ...]:
        """What each slot holds but the score's."""
        return (*(value.example for value in self.inputs), *self.values)

    def is_parameter(self, slot: int) -> bool:
        """Whether a slot holds a parameter or buffer of a module."""
        return slot < len(self.inputs) and self.inputs[slot].is_parameter

    def size_of(self, size: Size, args: Any) -> int | None:
        """Returns a size of the pass with these inputs, None where they do not tell it."""
        if isinstance(size, int):
            return size
        numbers = {example: i for i, example in enumerate(self.examples[: len(self.inputs)]) if _is_symbol(example)}
        if not size.free_symbols <= numbers.keys():
            return None
        return int(size.xreplace({symbol: sympy.Integer(args[numbers[symbol]]) for symbol in size.free_symbols}))


def _is_symbol(example: Example) -> bool:
    return isinstance(example, sympy.Symbol)


def segment_name(kind: str, depth: int) -> str:
    """Returns a segment's kind, with the number of the block where there are several: "block_3"."""
    return kind if kind in ("prologue", "head", "river_head") else f"{kind}_{depth}"
