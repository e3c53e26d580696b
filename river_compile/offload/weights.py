"""Backbone offloading: blocks deeper than ``offload=k`` leave device memory, their twins stay.

    offload_policy="exit"    every token leaves by depth k; only prompts run the blocks after it
    offload_policy="fetch"   a token that goes on brings a block in, and the next one while that block runs

The weights move when the decode graph is compiled, which is when their twins have been packed. A module's parameters
stay what they are, but their memory is elsewhere (a mapped file on the CPU, pinned host memory on a GPU), where
everybody can read them: ``state_dict``, ``save_pretrained`` and the plain model work as before.

What stays: weights that the resident parts read too (prologue, blocks up to k, twins, heads), weights that share their
memory with others, and those smaller than a page.

Not handled: parameters that the caller replaces (``p.data = ...``) after they were offloaded are used as they are.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.offload.disk import MappedFiles
from river_compile.offload.pinned import PinnedMemory
from river_compile.offload.store import Stored, WeightStore
from river_compile.passes.nodes import input_name, is_ordinary, is_parameter, value_of
from river_compile.passes.program import DecoderPlan, Program
from river_compile.upstream.tensors import parts_of

log = logging.getLogger("river_compile.offload.weights")

_PAGE = 4096  # bytes; smaller weights are not worth a mapping


@dataclass
class OffloadLog:
    """The weights that left device memory. Sizes in bytes; holds no tensor."""

    blocks: tuple[int, int]  # depths (from 1) of the first and the last offloaded block
    policy: str
    where: str
    moved: int  # of the weights that left
    kept: int  # of weights of these blocks that stay, because something resident reads them
    weights: int  # of the model's parameters and of the packed twins, before anything left
    peak_before: int  # peak memory (of the process on a CPU, of the device on a GPU) until the weights left
    peak_after: int = 0  # largest memory seen since, at the borders of blocks that were brought in and when asked for
    brought_in: int = 0  # of weights that were sent for since, by prompts and by tokens

    @property
    def resident(self) -> int:
        """Bytes of parameters and packed twins that stayed in device memory."""
        return self.weights - self.moved

    def to_dict(self) -> dict[str, object]:
        """Returns the log as values that ``json.dumps`` takes."""
        return {**asdict(self), "blocks": list(self.blocks), "resident": self.resident}

    def lines(self) -> list[str]:
        """Returns the log for people."""
        first, last = self.blocks
        share = 100 * self.resident / self.weights
        return [
            f"  offloaded      blocks {first} to {last}, {self.moved / 1e6:.1f} MB in {self.where}; {self.policy!r}",
            f"    resident     {self.resident / 1e6:.1f} of {self.weights / 1e6:.1f} MB of weights and twins "
            f"({share:.0f} %); of the offloaded blocks {self.kept / 1e6:.2f} MB stay",
            f"    peak memory  {self.peak_before / 1e6:.1f} MB before, {self.peak_after / 1e6:.1f} MB since",
            f"    brought in   {self.brought_in / 1e6:.1f} MB since",
        ]


class OffloadedWeights:
    """The offloaded weights of one model, each held as long as its parameter lives.

    Attributes:
        store: where they lie.
        log: what left, None where everything is in device memory.
    """

    def __init__(self) -> None:
        self._stored: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self.store = WeightStore()
        self.log: OffloadLog | None = None

    def find(self, weight: Tensor) -> Stored | None:
        """Returns where a weight lies, None if it is in device memory (the caller may have put it back)."""
        stored = self._stored.get(weight)
        return stored if stored is not None and stored.tensor.data_ptr() == weight.data_ptr() else None

    def check(self, plan: DecoderPlan, config: RiverConfig) -> None:
        """Checks, before anything is packed, that there is a place for what a model's decode graph will offload.

        Raises:
            OptionError: (a ``ValueError``) the folder takes no files or is too small, or weights are quantized tensors.
        """
        if config.offload is None or self.log is not None:
            return
        deeper = [node for node, part in plan.part_of.items() if config.offload < part <= plan.num_blocks]
        weights = {weight for node in deeper for weight in node.all_input_nodes if is_parameter(weight)}
        quantized = next((weight for weight in weights if not is_ordinary(value_of(weight))), None)
        if quantized is not None:
            raise OptionError(
                f"offload={config.offload} is not available where weights are {type(value_of(quantized)).__name__}s, "
                f"such as {input_name(quantized)}; leave offload out, or load the model unquantized"
            )
        self.store = make_store(config, plan)
        self.store.check_room(sum(value_of(weight).nbytes for weight in weights))

    def arrange(self, program: Program, inputs: Sequence[Any], config: RiverConfig, packed_bytes: int) -> None:
        """Puts the weights of a decode graph where the options want them: away or back.

        Args:
            program: of the decode graph.
            inputs: its inputs, real tensors.
            config: the options.
            packed_bytes: of its twins' packed weights, for the log.

        Raises:
            OptionError: (a ``ValueError``) there is no room; nothing has moved then.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            weights = [value for i, value in enumerate(inputs) if program.is_parameter(i)]
            resident = program.num_blocks if config.offload is None else config.offload
            away, kept = _movable(program, inputs, resident)
            leave = set(map(id, away))
            self._bring_back(weight for weight in weights if id(weight) not in leave)
            if not away:
                self.log = None
                return
            peak = self.store.peak()
            self._put([weight for weight in away if self.find(weight) is None])
            before = self.log  # (of another graph of the same model)
            self.log = OffloadLog(
                blocks=(resident + 1, program.num_blocks),
                policy=config.offload_policy,
                where=self.store.where,
                moved=_bytes(away),
                kept=_bytes(kept),
                weights=_bytes(weights) + packed_bytes,
                peak_before=peak if before is None else before.peak_before,
                peak_after=0 if before is None else before.peak_after,
                brought_in=0 if before is None else before.brought_in,
            )
            self.sample()
            log.info("%s", "\n".join(line.strip() for line in self.log.lines()))

    def restore(self, weights: Iterable[Tensor]) -> int:
        """Brings weights back into device memory; returns their bytes."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.log = None
            return self._bring_back(weights)

    def sent_for(self, nbytes: int) -> None:
        """Notes that so many bytes of weights come in."""
        if self.log is not None:
            self.log.brought_in += nbytes

    def sample(self) -> None:
        """Notes the memory in use for the log's peak."""
        if self.log is not None:
            self.log.peak_after = max(self.log.peak_after, self.store.memory())

    def snapshot(self) -> OffloadLog | None:
        """Returns the log as it is now."""
        self.sample()
        return None if self.log is None else replace(self.log)

    def _put(self, weights: Sequence[Tensor]) -> None:
        with tqdm(weights, desc="river: offloading", unit="matrix", leave=False, delay=1) as bar:
            stored = [self.store.put(weight) for weight in bar]
        for weight, new in zip(weights, stored, strict=True):
            original = weight.data
            weight.data = new.tensor
            self._stored[weight] = new
            self.store.discard(original)
            del original
        self.store.settle()

    def _bring_back(self, weights: Iterable[Tensor]) -> int:
        size = 0
        for weight in weights:
            stored = self.find(weight)
            if stored is not None:
                weight.data = self.store.take_back(stored)
                size += weight.nbytes
            self._stored.pop(weight, None)
        return size


def _movable(program: Program, inputs: Sequence[Any], resident: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the weights of the blocks after the first `resident` that can leave, and those of them that stay."""
    blocks = program.blocks[resident:]
    stay = {slot for segment in program.segments if segment not in blocks for slot in segment.inputs}
    users = Counter(_memory(value) for i, value in enumerate(inputs) if program.is_parameter(i))
    slots = dict.fromkeys(slot for segment in blocks for slot in segment.inputs if program.is_parameter(slot))
    away: list[Tensor] = []
    kept: list[Tensor] = []
    for slot in slots:
        weight = inputs[slot]
        movable = is_ordinary(weight) and weight.nbytes >= _PAGE and _is_dense(weight)
        alone = slot not in stay and users[_memory(weight)] == 1
        (away if alone and movable else kept).append(weight)
    return away, kept


def _is_dense(weight: Tensor) -> bool:
    """True if a tensor's elements lie side by side, in any order."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return span == weight.numel()


def _memory(weight: Tensor) -> int:
    return parts_of(weight)[0].untyped_storage().data_ptr()


def _bytes(weights: Iterable[Tensor]) -> int:
    """Returns the size of weights, memory that several of them share once."""
    return sum({_memory(weight): weight.nbytes for weight in weights}.values())


def make_store(config: RiverConfig, plan: DecoderPlan) -> WeightStore:
    """Returns the store for the device of a model."""
    return MappedFiles(config.offload_dir) if plan.device.type == "cpu" else PinnedMemory(plan.device)
