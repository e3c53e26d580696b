"""Version counters of tensors: whether somebody changed one since it was seen.

Not handled: changes of inference tensors, which PyTorch does not count. A model that is made under
``torch.inference_mode()`` has such weights; they are taken to stay as they are.
"""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """Returns a number that grows with every change in place; 0 for a tensor whose changes nobody counts."""
    return 0 if tensor.is_inference() else tensor._version
