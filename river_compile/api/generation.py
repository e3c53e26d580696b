"""The ``generate`` of an accelerated model: the package's own loop if it can run, else transformers'.

It stands on the model itself, in front of the class's method. Everything that generates with the model asks the model:
``pipeline``, chat programs, servers, PEFT. Calls with a ``custom_generate`` of their own are left alone, and so are
``type(model).generate(model)`` and methods of ``generate``'s that a program calls by name.

Exact mode refuses in two ways: before the prompt ran (beams, assisted modes, attention weights as outputs, ...) the
call starts again in the class's method, on the model as it is without compilation; after it (a graph that the backend
could not rewrite) its loop goes on without drafts. What `decode` does not handle starts again in transformers' loop, on
the compiled model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from river_compile.decoding.mode import Call, ExactMode, decode
from river_compile.decoding.session import Session
from river_compile.decoding.speculative import SpeculativeDecoder
from river_compile.errors import DecodeError, ExactModeError
from river_compile.model_record import record_of
from river_compile.runtime.compiled_call import uncompiled
from river_compile.upstream.transformers import keep_out_of_copies, restore_copying

_GENERATE = "generate"
_OURS = "river_compile_mode"  # an attribute of our function


@dataclass(frozen=True)
class _ExactOrPlain(ExactMode):
    """Exact mode that goes on without drafts if the prompt showed that they cannot be verified."""

    def decoder(self, call: Call, session: Session, logits: Tensor) -> SpeculativeDecoder:
        try:
            return super().decoder(call, session, logits)
        except ExactModeError as refusal:
            if self.strict:
                raise
            _tell(call.model, refusal, by_backend=True)
            return SpeculativeDecoder(session)


class _LateStreamer(BaseStreamer):
    """Keeps the prompt until the first token is there: a call that starts again shows it once."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = None
        self._begun = False

    def put(self, value: Tensor) -> None:
        if not self._begun and self._prompt is None:
            self._prompt = value
            return
        self._begin()
        self._streamer.put(value)

    def end(self) -> None:
        self._begin()
        self._streamer.end()

    def _begin(self) -> None:
        if not self._begun and self._prompt is not None:
            self._streamer.put(self._prompt)
        self._begun = True


def generate_exactly(model: PreTrainedModel, mode: ExactMode) -> None:
    """Makes ``model.generate`` use exact mode with the options of `mode`; copies and pickles have the class's again."""
    options = dict(vars(mode))

    def refused(self: PreTrainedModel, args: tuple, kwargs: dict[str, Any], refusal: Exception) -> Any:
        if mode.strict:
            raise refusal
        _tell(self, refusal)
        with uncompiled():
            theirs = {name: value for name, value in kwargs.items() if name not in options}
            return type(self).generate(self, *args, **theirs)

    _generate_by(model, _ExactOrPlain(**options), ExactModeError, refused)


def generate_in_own_loop(model: PreTrainedModel) -> None:
    """Makes ``model.generate`` use `decode`, in the same way."""

    def refused(self: PreTrainedModel, args: tuple, kwargs: dict[str, Any], refusal: Exception) -> Any:
        return type(self).generate(self, *args, **kwargs)

    _generate_by(model, decode, DecodeError, refused)


def _generate_by(
    model: PreTrainedModel,
    loop: Callable[..., Any],
    refusal: type[Exception],
    refused: Callable[[PreTrainedModel, tuple, dict[str, Any], Exception], Any],
) -> None:
    """Gives a model a ``generate`` that goes through a loop, and through `refused` if the loop refuses."""
    plain = type(model).generate

    @functools.wraps(plain)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            return plain(self, *args, **kwargs)
        streamer = kwargs.get("streamer")
        late = {} if streamer is None else {"streamer": _LateStreamer(streamer)}
        try:
            return plain(self, *args, **{**kwargs, "custom_generate": loop, **late})
        except refusal as reason:
            because = reason
        return refused(self, args, kwargs, because)

    setattr(generate, _OURS, loop)
    method = MethodType(generate, model)
    keep_out_of_copies(model, _GENERATE)
    vars(model)[_GENERATE] = method


def restore_generate(model: nn.Module) -> None:
    """Gives a model the ``generate`` of its class back."""
    if is_patched(model):
        del vars(model)[_GENERATE]
        restore_copying(model)


def is_patched(model: nn.Module) -> bool:
    """Returns whether one of the functions above changed a model's."""
    return hasattr(vars(model).get(_GENERATE), _OURS)


def has_generate_of_its_own(model: nn.Module) -> bool:
    """Returns whether something else put a ``generate`` on a model, such as transformers a folder's."""
    return _GENERATE in vars(model) and not is_patched(model)


def _tell(model: PreTrainedModel, refusal: Exception, by_backend: bool = False) -> Any:
    """Counts a call that runs plainly, and returns the model's state.

    What came `by_backend`, which warns of the graphs that it refuses, is not warned of again.
    """
    record = record_of(model.parameters())
    reason = str(refusal).partition("; ")[0]  # (what follows is for those who asked for exact mode by name)
    told = by_backend and any(graph.refusal for graph in record.graphs)
    record.plain_calls.count(type(model).__name__, reason, told)
    return record
