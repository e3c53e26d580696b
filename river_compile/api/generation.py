"""The ``generate`` of an accelerated model: the package's own loop if it can run, else transformers'.

It stands on the model itself, in front of the class's method. Everything that generates with the model asks the model:
``pipeline``, chat programs, servers, PEFT. Calls with a ``custom_generate`` of their own are left alone, and so are
``type(model).generate(model)`` and methods of ``generate``'s that a program calls by name.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from river_compile.decoding.mode import Call, Decode, ExactMode
from river_compile.decoding.session import Session
from river_compile.decoding.speculative import SpeculativeDecoder
from river_compile.errors import ExactModeError, RiverWarning
from river_compile.model_record import record_of
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


def generate_by(model: PreTrainedModel, mode: Decode) -> None:
    """Gives a model a ``generate`` that goes through a loop; copies and pickles have the class's again.

    What the loop refuses before the prompt ran (beams, assisted modes, attention weights as outputs, ...) starts again
    in the class's method. A graph that could not be rewritten shows after it: the loop goes on without drafts.
    """
    plain = type(model).generate
    loop = _ExactOrPlain(**vars(mode)) if isinstance(mode, ExactMode) else mode
    options = set(loop.per_call)

    @functools.wraps(plain)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            return plain(self, *args, **kwargs)
        streamer = kwargs.get("streamer")
        late = {} if streamer is None else {"streamer": _LateStreamer(streamer)}
        try:
            return plain(self, *args, **{**kwargs, "custom_generate": loop, **late})
        except mode.refusal as refusal:
            if isinstance(mode, ExactMode) and mode.strict:
                raise
            _tell(self, refusal)
        return plain(self, *args, **{name: value for name, value in kwargs.items() if name not in options})

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


def _tell(model: PreTrainedModel, refusal: Exception, by_backend: bool = False) -> None:
    """Counts a call that runs plainly; the first one for a reason is warned of.

    What came `by_backend`, which warns of the graphs that it refuses, is not warned of again.
    """
    record = record_of(model.parameters())
    reason = str(refusal).partition("; ")[0]  # (what follows is for those who asked for exact mode by name)
    record.fallbacks[reason] += 1
    told = by_backend and any(graph.refusal for graph in record.graphs)
    if record.fallbacks[reason] == 1 and not told:
        warnings.warn(f"{type(model).__name__}.generate runs plainly here: {reason}", RiverWarning, stacklevel=3)
