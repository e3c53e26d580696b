"""Lets a thread run the calls of a compiled model as the model is without compilation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo.exc import TorchRuntimeError

from river_compile.upstream.compiled_calls import error_of_code
from river_compile.upstream.dynamo_cache import trace_anew


class _Thread(threading.local):
    """Whether a thread calls models as they are without compilation."""

    plain = False


_thread = _Thread()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Inside, this thread calls models with a :class:`CompiledOrPlain` as they are without compilation."""
    before, _thread.plain = _thread.plain, True
    try:
        yield
    finally:
        _thread.plain = before


def on_purpose() -> bool:
    """Tells whether this thread calls models plainly at the moment."""
    return _thread.plain


class CompiledOrPlain:
    """Stands as the compiled call of a model.

    Attributes:
        compiled: what ``torch.compile`` returned, or what stands around it.
    """

    def __init__(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.compiled, self._plain = compiled, plain
        self._called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _thread.plain:
            return self._plain(*args, **kwargs)
        if not self._called:
            self._called = True
            trace_anew()
        try:
            return self.compiled(*args, **kwargs)
        except TorchRuntimeError as error:
            raise error_of_code(error) from None
