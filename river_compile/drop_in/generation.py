"""The ``generate`` of an accelerated model: exact mode where it can run, the plain model where it cannot.

It stands on the model itself, in front of the class's method. Everything that generates with the model asks the model:
``pipeline``, chat programs, servers, PEFT. Calls with a ``custom_generate`` of their own are left alone, and so are
``type(model).generate(model)`` and methods of ``generate``'s that a program calls by name.

Two kinds of refusal: before the prompt ran (beams, assisted modes, attention weights as outputs, ...) the call starts
again in the class's method, on the model as it is without compilation; after it (a graph that the backend could not
rewrite) exact mode's loop goes on without drafts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from river_compile.errors import ExactModeError
from river_compile.reporting.plain_calls import PlainCalls
from river_compile.runtime.plain_calls import plainly
from river_compile.speculative.hf_frames import argument_of_generate
from river_compile.speculative.mode import ExactMode
from river_compile.speculative.plain import PlainRunner
from river_compile.speculative.runner import DraftVerifyRunner
from river_compile.state import state_of
from river_compile.upstream.module_state import copy_as_ever, keep_out_of_copies

_GENERATE = "generate"
_OURS = "river_compile_mode"  # an attribute of our function


@dataclass(frozen=True)
class _ExactOrPlain(ExactMode):
    """Exact mode that goes on without drafts where the prompt showed that they cannot be verified."""

    def begin(
        self, runner: DraftVerifyRunner, input_ids: Tensor, config: GenerationConfig
    ) -> tuple[DraftVerifyRunner | PlainRunner, Tensor]:
        streamer = argument_of_generate("streamer")
        if isinstance(streamer, _LateStreamer):
            streamer.begin()
        try:
            return super().begin(runner, input_ids, config)
        except ExactModeError as refusal:
            state = _tell(runner.model, refusal)
            plain = PlainRunner(runner.model, runner.model_kwargs, runner.cache, state)
            return plain, runner.prompt_logits


class _LateStreamer(BaseStreamer):
    """Keeps what a streamer is given until exact mode has taken the call: a call that starts again shows it once."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._kept: list[Tensor] | None = []

    def begin(self) -> None:
        """Hands on what was kept, and from now on everything."""
        kept, self._kept = self._kept or (), None
        for value in kept:
            self._streamer.put(value)

    def put(self, value: Tensor) -> None:
        if self._kept is None:
            self._streamer.put(value)
        else:
            self._kept.append(value)

    def end(self) -> None:
        self._streamer.end()


def generate_exactly(model: PreTrainedModel, mode: ExactMode) -> None:
    """Makes ``model.generate`` use exact mode with the options of `mode`; copies and pickles have the class's again."""
    plain = type(model).generate
    options = dict(vars(mode))

    @functools.wraps(plain)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            return plain(self, *args, **kwargs)
        streamer = kwargs.get("streamer")
        ours = {"custom_generate": _ExactOrPlain(**options)}
        if streamer is not None:
            ours["streamer"] = _LateStreamer(streamer)
        try:
            return plain(self, *args, **{**kwargs, **ours})
        except ExactModeError as refusal:
            _tell(self, refusal)
        with plainly():
            return plain(self, *args, **{name: value for name, value in kwargs.items() if name not in options})

    setattr(generate, _OURS, mode)
    vars(model)[_GENERATE] = MethodType(generate, model)
    keep_out_of_copies(model, _GENERATE)


def generate_as_ever(model: nn.Module) -> None:
    """Gives a model the ``generate`` of its class back."""
    if has_generate_of_ours(model):
        del vars(model)[_GENERATE]
        copy_as_ever(model)


def has_generate_of_ours(model: nn.Module) -> bool:
    """Returns whether :func:`generate_exactly` changed a model."""
    return hasattr(vars(model).get(_GENERATE), _OURS)


def has_generate_of_its_own(model: nn.Module) -> bool:
    """Returns whether something else put a ``generate`` on a model, such as transformers a folder's."""
    return _GENERATE in vars(model) and not has_generate_of_ours(model)


def _tell(model: PreTrainedModel, refusal: ExactModeError) -> Any:
    """Counts a call that runs plainly, and returns what is known of the model."""
    state = state_of(model.parameters())
    reason = str(refusal).partition("; ")[0]  # (what follows is for those who asked for exact mode by name)
    state.of(PlainCalls).count(type(model).__name__, reason)
    return state
