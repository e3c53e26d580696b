"""Keeps what is put on one module out of its copies and pickles, so that both are of the plain model.

``copy.copy``, ``copy.deepcopy``, ``pickle`` and ``torch.save`` ask an object, not its class, for ``__getstate__``. One
that stands on the module itself leaves out the named attributes, the hooks marked with ``CHANGES_NOTHING``, and itself:
a copy has the class's own again, and a pickle is read where this package is not installed.

Not handled: classes whose ``__getstate__`` does not return a dict; their state is left as it is.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from .dynamo_cache import CHANGES_NOTHING

_GETSTATE = "__getstate__"


def keep_out_of_copies(module: nn.Module, *attributes: str) -> None:
    """Makes copies of a module come without these attributes of it, and without hooks that change nothing."""
    state = vars(module).get(_GETSTATE)
    if not isinstance(state, _PlainState):
        state = vars(module)[_GETSTATE] = _PlainState(module)
    state.leave_out.update(attributes)


def copy_as_ever(module: nn.Module) -> None:
    """Takes back what :func:`keep_out_of_copies` did."""
    if isinstance(vars(module).get(_GETSTATE), _PlainState):
        del vars(module)[_GETSTATE]


class _PlainState:
    """Stands as ``__getstate__`` on one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.leave_out = {_GETSTATE}

    def __call__(self) -> Any:
        module = self._module()
        assert module is not None, "a module that is being copied is alive"
        state = type(module).__getstate__(module)
        if not isinstance(state, dict):
            return state
        plain = {name: value for name, value in state.items() if name not in self.leave_out}
        hooks = state["_forward_pre_hooks"]
        plain["_forward_pre_hooks"] = type(hooks)(
            (number, hook) for number, hook in hooks.items() if not getattr(hook, CHANGES_NOTHING, False)
        )
        return plain
