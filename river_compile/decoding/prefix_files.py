"""The prefix cache on disk: KV entries of long prompts, in blocks of the compile cache that later processes map.

Not handled: entries that decoding wrote; devices other than the CPU; models with several dtypes of entries, without an
identity, or in float32, where a token's entries depend on how many tokens run with it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.compile_cache.folder import BLOCK, PROMPTS, Entry, evict, is_enabled
from river_compile.compile_cache.tensor_file import is_whole, map_tensors, read_metadata, write_tensors
from river_compile.decoding.kv_cache import Entries
from river_compile.kernels.native.build import hash_of_sources
from river_compile.kernels.native.load import any_rows
from river_compile.model_state import ModelState
from river_compile.twins.threads import in_threads
from river_compile.twins.weights import digest_of

# A block is a safetensors file with one tensor, the keys and values ``[H, T, D]`` of all layers in their order. Its
# name has the hash of the tokens before it, and the hash of those and its own. The last block of a prompt is shorter.
_TOKENS = 64  # of a block
_LEAST_PROMPT = 256  # tokens; a shorter one is read in less time than it takes to look after its files
_VERSION = "1"
_ROOT = "0" * 32
_TENSOR = "entries"
_COMPARED = 16  # blocks after the same tokens, of which the nearest is looked for
_SHORT = 8  # short blocks that are written after the same tokens, at most
_UNWRITTEN = 512 * 2**20  # bytes that wait to be written, at most


class _Block(NamedTuple):
    """Tokens with a place in a text."""

    first: int  # their place
    ids: list[int]
    parent: str  # hash of the tokens before them
    own: str  # of those and these

    @property
    def name(self) -> str:
        return f"{self.parent}-{self.own}{BLOCK}"


class PrefixFiles:
    """The blocks of one model. Thread-safe."""

    def __init__(self) -> None:
        self._known: tuple[ModelState, Entry | None] | None = None  # the entry of the model's latest state
        self._writing: list[_Writing] = []

    def find(self, model: PreTrainedModel, state: ModelState, ids: Tensor, beyond: int, like: Entries) -> list[Entries]:
        """Return the mapped entries of the first tokens of `ids`, in parts; none unless they are more than `beyond`.

        Args:
            model: in `state`, which is the same object until the model changes.
            ids: ``[T]``, those that may be reused.
            beyond: tokens whose entries are in memory.
            like: entries of the cache that they are for, of no token.
        """
        if model.device.type != "cpu" or (len(ids) < _TOKENS and self._known is not None):
            return []
        entry = self._entry(model, state)  # a first call computes the hash of the weights, whatever its prompt
        there = set() if entry is None else set(entry.names(BLOCK))
        chain = [*itertools.takewhile(lambda block: block.name in there, _blocks(ids))]
        if entry is None or not chain or len(chain) * _TOKENS < beyond + _TOKENS:
            return []
        parts: list[Entries] = []
        for block in chain:
            part = _read(entry, block.name, like)
            if part is None:
                return parts
            parts.append(part)
        rest = ids[len(chain) * _TOKENS :][:_TOKENS].tolist()
        name, shared = _nearest(entry, rest, [name for name in there if name.startswith(chain[-1].own)])
        part = _read(entry, name, like) if shared else None
        names = [block.name for block in chain]
        if part is not None:
            parts.append([(keys[:, :shared], values[:, :shared]) for keys, values in part])
            names.append(name)
        _touch(entry, names)
        return parts

    def save(self, model: PreTrainedModel, state: ModelState, ids: Tensor, entries: Entries) -> None:
        """Write a prompt's entries in the background, unless they are there; returns when they are copied."""
        known, kinds = self._known, {tensor.dtype for pair in entries for tensor in pair}
        if known is None or known[0] is not state or known[1] is None:
            return
        if len(ids) < _LEAST_PROMPT or len(kinds) > 1 or model.device.type != "cpu" or not any_rows(model.dtype):
            return
        entry, blocks = known[1], [*_blocks(ids, whole=False)]
        there = set(entry.names(BLOCK))
        self._writing = [writing for writing in self._writing if writing.is_alive()]
        left = _UNWRITTEN - sum(writing.bytes for writing in self._writing)
        new: list[tuple[_Block, Tensor]] = []
        for block in blocks:
            tokens = len(block.ids)
            after_same = sum(name.startswith(block.parent) for name in there) if tokens < _TOKENS else 0
            if block.name in there or after_same >= _SHORT:
                continue
            flat = torch.empty(sum(t[:, :tokens].numel() for pair in entries for t in pair), dtype=next(iter(kinds)))
            left -= flat.nbytes
            if left < 0:
                break
            for pair, given in zip(_by_layer(flat, entries, tokens), entries, strict=True):
                for place, tensor in zip(pair, given, strict=True):
                    place.copy_(tensor[:, block.first : block.first + tokens])
            new.append((block, flat))
        if new:
            self._writing.append(_Writing(entry, new, [block.name for block in blocks]))
            self._writing[-1].start()

    def _entry(self, model: PreTrainedModel, state: ModelState) -> Entry | None:
        """Return the folder of a model in a state, None if the compile cache is off."""
        known = self._known
        if known is None or known[0] is not state:
            known = self._known = state, _entry_of(model, state) if is_enabled() else None
        return known[1]


def _entry_of(model: PreTrainedModel, state: ModelState) -> Entry:
    """Return the entry named by all that a token's keys and values depend on; reads all weights."""
    digests = in_threads(lambda tensor: digest_of([tensor]), [*model.parameters(), *model.buffers()])
    identity = repr((_VERSION, state.identity, hash_of_sources(), digests))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    about = f"prompts of {type(model).__name__}, {size:.0f}M parameters"
    return Entry(PROMPTS + hashlib.sha256(identity.encode()).hexdigest()[:40], about)


def _blocks(ids: Tensor, whole: bool = True) -> Iterator[_Block]:
    """Yield the blocks of a text; of a prompt's end only if it fills a block, or if not `whole`."""
    parent = _ROOT
    for first in range(0, len(ids), _TOKENS):
        some = ids[first : first + _TOKENS].tolist()
        if whole and len(some) < _TOKENS:
            return
        own = hashlib.sha256(f"{parent} {some}".encode()).hexdigest()[: len(_ROOT)]
        yield _Block(first, some, parent, own)
        parent = own


def _by_layer(flat: Tensor, like: Entries, tokens: int) -> Entries:
    """Return views of a block's tensor."""
    shapes = [(tensor.shape[0], tokens, tensor.shape[2]) for pair in like for tensor in pair]
    views = [
        piece.view(shape) for piece, shape in zip(flat.split([h * t * d for h, t, d in shapes]), shapes, strict=True)
    ]
    return [*zip(views[::2], views[1::2], strict=True)]


def _read(entry: Entry, name: str, like: Entries) -> Entries | None:
    """Map a block, None if it is missing, not trusted or damaged, which is a warning."""
    file = entry.folder / name
    if not entry.trusts(name):
        return None
    try:
        tokens = len(_ids_of(file, entry, name))
        if not is_whole(file, read_metadata(file)):
            raise ValueError("its hash differs from the one that it states")
        flat = map_tensors(file)[_TENSOR]
        if flat.dtype != like[0][0].dtype:
            raise ValueError(f"it holds {flat.dtype}")
        return _by_layer(flat, like, tokens)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        entry.remove_damaged(name, error)
        return None


def _ids_of(file: Path, entry: Entry, name: str) -> list[int]:
    """Return the tokens of a block, by its header. Raises an OSError, SafetensorError, LookupError or ValueError."""
    metadata = read_metadata(file)
    if metadata["place"] != _place(entry, name):
        raise ValueError(f"it is {metadata['place']}")
    ids: list[int] = json.loads(metadata["ids"])
    return ids


def _place(entry: Entry, name: str) -> str:
    return f"{entry.folder.name}/{name}"


def _nearest(entry: Entry, ids: Sequence[int], names: Sequence[str]) -> tuple[str, int]:
    """Return the name of the block that shares the most first tokens with `ids`, and their number."""
    best = "", 0
    for name in sorted(names)[:_COMPARED]:
        if not entry.trusts(name):
            continue
        try:
            its = _ids_of(entry.folder / name, entry, name)
        except FileNotFoundError:
            continue
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            entry.remove_damaged(name, error)
            continue
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, its, strict=False)))
        best = max(best, (name, same), key=lambda found: found[1])
    return best


def _touch(entry: Entry, names: Sequence[str]) -> None:
    """Mark blocks as used now; the first ones as the latest, since later ones are of no use without them."""
    now = time.time()
    for number, name in enumerate(names):
        try:
            os.utime(entry.folder / name, (now, now - number / 1000))
        except OSError:  # another process has removed it
            continue
    entry.touch()


class _Writing(threading.Thread):
    """Writes blocks; the interpreter waits for its end."""

    def __init__(self, entry: Entry, new: Sequence[tuple[_Block, Tensor]], names: Sequence[str]) -> None:
        super().__init__(name="river prefixes")
        self._entry, self._new, self._names = entry, new, names  # of the new blocks, and of all of the prompt
        self.bytes = sum(flat.nbytes for _, flat in new)

    def run(self) -> None:
        for block, flat in self._new:
            metadata = {"place": _place(self._entry, block.name), "ids": json.dumps(block.ids)}

            def write(scratch: Path, flat: Tensor = flat, metadata: dict[str, str] = metadata) -> None:
                write_tensors(scratch, {_TENSOR: flat}, metadata)

            self._entry.write_by(block.name, write)
        _touch(self._entry, self._names)
        evict()
