"""Checks a static KV cache for capacity without a device sync.

The filled length lies on the device. To read it is to wait for everything launched so far, so that nothing could be
queued ahead. On a GPU it is therefore read once and counted by the host from there on, for as long as PyTorch counts
no other change of that tensor: the captured steps that this package launches are the ones that it does not count.

Not handled (the length is read before every step): caches made under ``torch.inference_mode()``, of which PyTorch
counts no change. Not noticed: a length that another program's CUDA graph advances between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import CacheFullError
from river_compile.passes.program import RiverProgram
from river_compile.runtime.slots import size_of_pass
from river_compile.upstream.tensors import version_of


class _Known(NamedTuple):
    """The tokens that are in a cache once all steps launched so far have run, and the version of the tensor then."""

    filled: int
    version: int


class Slots(NamedTuple):
    """Where a capacity is read that differs from cache to cache: the slot of the keys or values, and the dimension."""

    cache: int
    dim: int


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the tensor of the length; graphs share the caches


class Capacity:
    """Checks one program's steps against the capacity of its first static cache that is filled from the front.

    Attributes:
        counts: whether the host counts, instead of reading the length before every step.
    """

    def __init__(self, length: int, new: int | Callable[[Sequence], int], capacity: int | Slots, counts: bool) -> None:
        self._length, self._new, self._slots = length, new, capacity
        self.counts = counts

    @classmethod
    def of(cls, program: RiverProgram) -> Capacity | None:
        """Returns the check of a program's steps, None if no block has such a cache whose size can be read."""
        plan = program.plan
        kv = next((block.kv for block in plan.blocks if block.kv.capacity is not None and block.kv.lengths), None)
        if kv is None or kv.capacity is None:
            return None
        capacity: int | Slots
        if isinstance(kv.capacity, int):
            capacity = kv.capacity
        else:
            written = next(
                (n for n in kv.writes if n.target is Tensor.index_copy_ and n.args[0] in program.slots), None
            )
            if written is None:
                return None
            capacity = Slots(program.slots[written.args[0]], written.args[1])
        return cls(program.slots[kv.lengths[0]], _new_tokens(program), capacity, plan.device.type != "cpu")

    def check(self, slots: list) -> int:
        """Returns how many tokens are in the cache after a step, whose slots it checks before anything is written.

        Raises:
            CacheFullError: its tokens have no room.
        """
        length, capacity = slots[self._length], self._capacity(slots)
        new = self._new if isinstance(self._new, int) else self._new(slots)
        known = _known.pop(length, None) if self.counts else None  # (a step that fails leaves nothing known)
        if known is None or length.is_inference() or known.version != version_of(length):
            filled = _read(length)
        else:
            filled = known.filled if known.filled + new <= capacity else _read(length)
        if filled + new > capacity:
            raise CacheFullError(
                f"the static KV cache holds {capacity} tokens; {filled} are filled and this step adds {new}. "
                f"Make it larger (max_cache_len or max_new_tokens, at least {filled + new}) or use a dynamic cache"
            )
        return filled + new

    def took(self, slots: list, filled: int) -> None:
        """Notes that a step has been launched for which :meth:`check` returned this."""
        if self.counts:
            length = slots[self._length]
            _known[length] = _Known(filled, version_of(length))

    def forget(self, slots: Sequence) -> None:
        """Notes that a step is launched which is not checked."""
        if self.counts:
            _known.pop(slots[self._length], None)

    def _capacity(self, slots: list) -> int:
        return self._slots if isinstance(self._slots, int) else slots[self._slots.cache].shape[self._slots.dim]


def _new_tokens(program: RiverProgram) -> int | Callable[[Sequence], int]:
    """Returns how many tokens of each row a step adds, or what tells it from the step's slots."""
    plan = program.plan
    if isinstance(plan.query_length, int):
        return plan.query_length
    size, hidden = size_of_pass(program), program.slots[plan.blocks[0].hidden_in]

    def new(slots: Sequence) -> int:
        state = slots[
            hidden
        ]  # (None where the prologue is captured with what follows, which is for passes of known size)
        return int(state.shape[plan.token_axis]) if size is None or state is not None else size(slots)[1]

    return new


def _read(length: Tensor) -> int:
    """Returns the length, for which the host waits if it is on a GPU."""
    return int(length)
