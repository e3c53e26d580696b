"""The compiled call of a model: marks the sizes that grow, and lets a thread call the model plainly."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch._dynamo.exc import TorchRuntimeError

from river_compile.upstream.dynamo import error_of_code, trace_anew
from river_compile.upstream.transformers import mark_growing


class _Thread(threading.local):
    """Whether a thread calls models as they are without compilation."""

    plain = False


_thread = _Thread()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, this thread calls models with a :class:`CompiledCall` as they are without compilation."""
    before, _thread.plain = _thread.plain, True
    try:
        yield
    finally:
        _thread.plain = before


def on_purpose() -> bool:
    """Tells whether this thread calls models plainly at the moment."""
    return _thread.plain


class CompiledCall:
    """The compiled call of a model.

    Args:
        compiled: what ``torch.compile`` returned.
        plain: the model's call as it is without.
        prompts: see :func:`install`.
        stays_plain: whether a call is none of the compiled one's; None: all are.

    Attributes:
        compiled: as above.
        after: called after each call of it.
    """

    after: Callable[[], object] | None = None

    def __init__(
        self,
        compiled: Callable[..., Any],
        plain: Callable[..., Any],
        prompts: bool,
        stays_plain: Callable[[], bool] | None = None,
    ) -> None:
        self.compiled, self._plain, self._prompts, self._stays_plain = compiled, plain, prompts, stays_plain
        self._may_be_given_up = prompts  # before the first call: Dynamo, for the sake of another model's code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _thread.plain or (self._stays_plain is not None and self._stays_plain()):
            return self._plain(*args, **kwargs)
        if self._may_be_given_up:
            self._may_be_given_up = False
            trace_anew()
        mark_growing(kwargs, self._prompts)
        try:
            result = self.compiled(*args, **kwargs)
        except TorchRuntimeError as error:
            raise error_of_code(error) from None
        if self.after is not None:
            self.after()
        return result


def install(model: nn.Module, prompts: bool = False, after: Callable[[], object] | None = None) -> None:
    """Puts a :class:`CompiledCall` in place of the compiled call that ``model.compile`` set.

    Args:
        model: a model that was compiled; one that was not is left alone.
        prompts: whether all calls are marked, for prompts of any length; False where one may have been traced already:
            then what goes on with a cache that grows is marked, which Dynamo would have traced again anyway.
        after: called after each compiled call; None leaves it as it is.
    """
    call: Any = model._compiled_call_impl
    if call is not None and not isinstance(call, CompiledCall):
        call = model._compiled_call_impl = CompiledCall(call, model._call_impl, prompts)
    if call is not None and after is not None:
        call.after = after


def compiled_call(model: nn.Module) -> Callable[..., Any] | None:
    """Returns the compiled function of a model's calls, None if it was not compiled."""
    call: Any = model._compiled_call_impl
    return call.compiled if isinstance(call, CompiledCall) else call
