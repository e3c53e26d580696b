"""The ``generate`` of an accelerated model: River's loop if it supports the call, else transformers'.

It is an attribute of the model, in front of the class's method, so ``pipeline``, servers and PEFT find it.
Not handled: calls with their own ``custom_generate``, and ``type(model).generate(model)``, which stay transformers'.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from river_compile.building.graph_record import Graphs
from river_compile.decoding.call import Call
from river_compile.decoding.given import Given
from river_compile.decoding.joining import alone
from river_compile.decoding.mode import Decode, ExactMode
from river_compile.decoding.passes import Passes
from river_compile.decoding.speculative import Drafting
from river_compile.errors import ExactModeError, RiverError, RiverWarning
from river_compile.kernels.messages import with_id
from river_compile.record import record_of
from river_compile.reporting.report import Fallbacks
from river_compile.upstream.transformers import forget_tokenizer, keep_out_of_copies, keeping_tokenizer, restore_copying

_GENERATE = "generate"
_OURS = "river_compile_mode"  # an attribute of River's function
# Whether this thread runs a refused call: transformers' assisted modes call a model's generate again.
_falls_back: ContextVar[bool] = ContextVar("_falls_back", default=False)


@dataclass(frozen=True)
class _ExactOrPlain(ExactMode):
    """Exact mode that continues without drafts if the model's graphs cannot verify them."""

    def drafting(self, call: Call, passes: Passes, logits: Tensor) -> Drafting | None:
        try:
            return super().drafting(call, passes, logits)
        except ExactModeError as refusal:
            if self.strict:
                raise
            _count_fallback(call.model, refusal, by_backend=True)
            return None


class _LateStreamer(BaseStreamer):
    """Delays the prompt until the first token, so a call that starts again in transformers shows it once."""

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


class _Handed:
    """A mode as a ``custom_generate`` callable, with what the caller gave."""

    def __init__(self, mode: Decode, given: Given) -> None:
        self._mode, self._given = mode, given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._mode(*args, **{**kwargs, "given": self._given})


def generate_by(model: PreTrainedModel, mode: Decode) -> None:
    """Replace a model's ``generate``; copies and pickles have the class's. Refused calls run transformers' loop."""
    plain = type(model).generate
    loop: Decode = _ExactOrPlain(**vars(mode)) if isinstance(mode, ExactMode) else mode
    parameters = inspect.signature(plain)

    @functools.wraps(plain)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None or _falls_back.get():
            return plain(self, *args, **kwargs)
        ours = loop
        if isinstance(loop, ExactMode) and "strict" in kwargs:
            strict = kwargs.pop("strict")
            ours = loop if strict is None else replace(loop, strict=strict)
        streamer = kwargs.get("streamer")
        if streamer is not None:
            kwargs["streamer"] = _LateStreamer(streamer)
        given = Given.of(parameters.bind_partial(self, *args, **kwargs).arguments)
        known = {name: value for name, value in kwargs.items() if name != "assistant_model"}  # `given` has it
        try:
            return plain(self, *args, **{**known, "custom_generate": _Handed(ours, given)})
        except mode.refusal as refusal:
            if isinstance(ours, ExactMode) and ours.strict:
                raise
            _count_fallback(self, refusal)
        if streamer is not None:
            kwargs["streamer"] = streamer
        with alone(record_of(self.parameters())), _fallback(self):
            return plain(self, *args, **kwargs)

    setattr(generate, _OURS, loop)
    attributes = keeping_tokenizer(model, lambda custom: isinstance(custom, _Handed))
    attributes[_GENERATE] = MethodType(generate, model)
    keep_out_of_copies(model, *attributes)
    vars(model).update(attributes)


@contextlib.contextmanager
def _fallback(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every generate of this thread is transformers' own; after an error the model is configured as before."""
    # A draft by early exit sets `num_hidden_layers` and leaves it so if it raises.
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    settings = [*configs.values(), *filter(None, [getattr(model, "generation_config", None)])]
    known = [(config, {**vars(config)}) for config in settings]
    token = _falls_back.set(True)
    try:
        yield
    except BaseException:
        for config, fields in known:
            vars(config).clear()
            vars(config).update(fields)
        raise
    finally:
        _falls_back.reset(token)


def restore_generate(model: nn.Module) -> None:
    """Give a model its class's ``generate`` back."""
    if is_patched(model):
        del vars(model)[_GENERATE]
        forget_tokenizer(model)
        restore_copying(model)


def is_patched(model: nn.Module) -> bool:
    """Whether River replaced a model's ``generate``."""
    return mode_of(model) is not None


def mode_of(model: nn.Module) -> Decode | None:
    """Return the mode of a model's ``generate``, None if River did not replace it."""
    found: Decode | None = getattr(vars(model).get(_GENERATE), _OURS, None)
    return found


def has_generate_of_its_own(model: nn.Module) -> bool:
    """Whether a model has another ``generate``, such as one from its folder."""
    return _GENERATE in vars(model) and not is_patched(model)


def _count_fallback(model: PreTrainedModel, refusal: RiverError, by_backend: bool = False) -> None:
    """Count a call that runs transformers' loop; warn once for each reason, unless the backend has already."""
    record = record_of(model.parameters())
    reason = refusal.text.partition(". ")[0]  # its first sentence
    fallbacks = record.of(Fallbacks)
    fallbacks[reason] += 1
    told = by_backend and any(graph.refusal for graph in record.of(Graphs))
    if fallbacks[reason] == 1 and not told:
        message = f"{type(model).__name__}.generate runs without River's drafts or exits: {refusal.text}"
        warnings.warn(with_id("RC064", message), RiverWarning, stacklevel=3)
