"""One launch for all calls that look alike: described, given a tile, loaded and checked for the first of them.

CUDA (and ROCm) tensors run compiled kernels, CPU tensors the same kernels in Triton's interpreter, which is exact and
slow: it is there for tests, and gets large tiles, since its time goes by operations. What a call is made of is in
`calls`, one module for each kind.

Describing, choosing and checking takes longer than many a kernel runs. A tuning file that is written later counts in
the next process.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from river_compile.kernels.triton.loader import Launch, load
from river_compile.kernels.triton.spec import KernelSpec

_MANY = 4096  # different calls that are remembered: prompts of all lengths must not fill the memory
_launches: dict[tuple[object, ...], Launch] = {}


def forget() -> None:
    """Forgets what was chosen for calls, so that the next of each kind chooses anew."""
    _launches.clear()


def chosen(how: tuple[object, ...], given: dict[str, Tensor], rows: int, describe: Callable[[], KernelSpec]) -> Launch:
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


def present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
