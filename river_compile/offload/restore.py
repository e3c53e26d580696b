"""Brings offloaded weights back."""

from __future__ import annotations

from torch import nn

from river_compile.state import find_state

from .weights import OffloadedWeights


def restore(model: nn.Module) -> int:
    """Brings a model's offloaded weights back into device memory, bit for bit.

    Nothing needs it to be right: the model, compiled or not, computes the same before and after. With
    ``offload_policy="exit"`` tokens still leave by that depth. The next decode graph that is compiled with ``offload=``
    offloads again.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The bytes that came back, 0 where nothing was offloaded.
    """
    state = find_state(model)
    return 0 if state is None else state.of(OffloadedWeights).restore([*model.parameters(), *model.buffers()])
