"""What a client may ask of ``river serve``: checked, put into transformers' terms, or refused by name.

Formats are those of OpenAI's API. Not handled: fields that transformers' server knows and applies itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from llguidance import LLTokenizer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from river_compile.cli.serving import forms
from river_compile.cli.serving.errors import Refused, invalid
from river_compile.cli.serving.grammars import Grammar, grammar_of, vocabulary_of
from river_compile.cli.serving.logprobs import Logprobs
from river_compile.cli.serving.tools import Calls
from river_compile.kernels.checks import did_you_mean, short_repr

Body = dict[str, Any]

# Fields that transformers' server ignores: with one of these values (or null) they ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include": ([],),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# Those that do not change a text.
_INERT = {"metadata", "prediction", "service_tier", "store", "stream_options", "user"}
# Transformers' own: it reaches all that `generate` does, what changes the model for later calls too.
_TRANSFORMERS = {"generation_config"}
_MOST_STOPS = 4  # OpenAI's limit
_COLDEST = 1e-5  # temperatures below are greedy, as vLLM's are: logits divided by them overflow

# Numbers: their kind, whether one is allowed, and which are.
_Number = tuple[type, Callable[[float], bool], str]
_COUNT: _Number = (int, lambda value: 1 <= value < 2**31, "1 or more")
_PENALTY: _Number = (float, lambda value: -2 <= value <= 2, "-2 to 2")
_NUMBERS: dict[str, _Number] = {
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "seed": (int, lambda value: -(2**63) <= value < 2**63, "an integer of 64 bits"),
    "temperature": (float, lambda value: 0 <= value <= 2, "0 (no sampling) to 2"),
    "top_p": (float, lambda value: 0 < value <= 1, "more than 0, up to 1"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
}
_PENALTIES = ("presence_penalty", "frequency_penalty")
# Fields that transformers' server ignores, and River takes.
_TAKEN = _INERT | {*_PENALTIES, "response_format", "text"}
_OF_COMPLETIONS = {"logprobs", "n"}
_OF_TOOLS = {"parallel_tool_calls", "tool_choice"}
_OF_CHATS = _OF_COMPLETIONS | _OF_TOOLS | {"top_logprobs"}
_TAKEN_BY: dict[type, set[str]] = {
    ChatCompletionHandler: _OF_CHATS,
    CompletionHandler: _OF_COMPLETIONS,
    ResponseHandler: _OF_TOOLS,
}
_MOST_LOGPROBS = {"top_logprobs": 20, "logprobs": 5}  # OpenAI's limits, of chats and of completions
# Other fields: their kind, and how a message names it.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "model": (str, "a string"),
    "stream": (bool, "true or false"),
    "suffix": (str, "a string"),
    "instructions": (str, "a string"),
    "tools": (list, "a list of objects"),
    "stop": ((str, list), f"a string, or a list of up to {_MOST_STOPS}"),
    "logit_bias": (dict, "an object of token ids and numbers"),
    "chat_template_kwargs": (dict, "an object"),
    "text": (dict, "an object"),
}
# What `apply_chat_template` itself takes is the server's to give.
_TEMPLATES_OWN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"}


@dataclass
class Ending:
    """How a text ended: written by what streams it, read by what tells the client."""

    cut: bool = False  # at the most tokens that were asked for

    def reason(self, told: str) -> str:
        """Return the `finish_reason` in place of transformers', which looks at numbers of tokens alone."""
        return "length" if self.cut else "stop" if told == "length" else told


@dataclass(frozen=True)
class Asked:
    """What a request asks besides transformers' settings."""

    seed: int | None = None
    stops: tuple[str, ...] = ()  # strings that end the text, and are left out of it
    presence: float = 0.0  # penalties of OpenAI's API
    frequency: float = 0.0
    choices: int = 1  # texts
    grammar: Callable[[], Grammar] | None = None  # of one text
    calls: Calls | None = None  # that a text is, by its grammar
    logprobs: Callable[[], Logprobs] | None = None  # of one text
    ending: Ending = field(default_factory=Ending)  # of one text

    @property
    def is_one_text(self) -> bool:
        """Whether an answer is the text of one choice, without more."""
        return self.choices == 1 and self.calls is None and self.logprobs is None

    def of_choice(self, index: int) -> Asked:
        """Return what one choice asks: its seed is the first one's plus its index."""
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        return replace(self, seed=seed, ending=Ending())

    def processors(self, length: int) -> list[LogitsProcessor]:
        """Return the processors after a prompt of `length` tokens."""
        penalties = [Penalties(length, self.presence, self.frequency)] if self.presence or self.frequency else []
        return [*penalties, *([] if self.grammar is None else [self.grammar()])]


NOTHING = Asked()
asked: ContextVar[Asked] = ContextVar("asked", default=NOTHING)  # by the request that this task answers


def translated(handler: Any, body: Body) -> Asked:
    """Check what a handler of transformers' server is asked, and put it into transformers' terms.

    Args:
        handler: that will answer.
        body: changed in place; what has no place in it is returned.

    Raises:
        Refused: it is not supported, or a value is not allowed; the error names it.
    """
    _check_names(handler, body)
    for name, (kind, form) in _KINDS.items():
        if body.get(name) is not None:
            forms.need(body[name], kind, name, form)
    served = handler.model_manager.force_model
    if body.get("model") not in (None, served):
        raise no_model(body["model"], served)
    _check_prompt(handler, body)
    _check_unsupported(handler, body)
    _check_numbers(body)
    choices, logprobs = _choices(handler, body), _logprobs(handler, body)
    for i, tool in enumerate(body.get("tools") or ()):
        forms.need(tool, dict, f"tools[{i}]", "an object")
        forms.need(tool.get("function", {}), dict, f"tools[{i}].function", "an object")
    for name in sorted(_TEMPLATES_OWN & (body.get("chat_template_kwargs") or {}).keys()):
        where = f"chat_template_kwargs.{name}"
        raise Refused(400, "unsupported_value", f"{where} is not supported; leave it out", where)
    if body.get("temperature") is not None and body["temperature"] < _COLDEST:
        body["temperature"] = 0
    # transformers' responses are streamed by default, OpenAI's are not
    body["stream"], body["chat_template_kwargs"] = bool(body.get("stream")), body.get("chat_template_kwargs") or {}
    if body.get("logit_bias") is not None:
        body["logit_bias"] = _biases(body["logit_bias"])
    stops = _stops(body)
    presence, frequency = (float(body.pop(name, None) or 0) for name in _PENALTIES)
    calls = Calls.of(body, isinstance(handler, ResponseHandler)) if _has_tools(handler) else None
    grammar = _form(body)
    if calls is not None:  # its calls leave no text that could have a form
        grammar = calls.grammar(*_tokenizer(handler))
    text = None if grammar is None else functools.partial(Grammar, grammar, _tokenizer(handler)[1])
    # (A seed given to transformers would seed the whole process.)
    seed = body.pop("seed", None)
    return Asked(seed, stops, presence, frequency, choices, text, calls, logprobs)


def _has_tools(handler: Any) -> bool:
    return isinstance(handler, (ChatCompletionHandler, ResponseHandler))


def _tokenizer(handler: Any) -> tuple[Any, LLTokenizer]:
    (loaded,) = handler.model_manager.loaded_models.values()
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    return tokenizer, vocabulary_of(tokenizer, loaded.model.config.get_text_config().vocab_size)


def _choices(handler: Any, body: Body) -> int:
    given = body.pop("n", None)
    limit = handler.generation_state.manager.limit
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= limit):
        raise invalid(f"n={short_repr(given)} is not allowed; give 1 to {limit} (--max-num-seqs)", "n")
    return given or 1


def _logprobs(handler: Any, body: Body) -> Callable[[], Logprobs] | None:
    """Return what makes the processor that keeps log-probabilities, None if none are asked for."""
    given, top, name = body.pop("logprobs", None), body.pop("top_logprobs", None), "logprobs"
    if isinstance(handler, ChatCompletionHandler):
        if given is not None and not isinstance(given, bool):
            raise invalid(f"logprobs={short_repr(given)} is not true or false", "logprobs")
        if top and not given:
            raise invalid(f"top_logprobs={short_repr(top)} needs logprobs=true", "top_logprobs")
        given, name = (top or 0) if given else None, "top_logprobs"
    if given is None or given is False:  # (some clients send it)
        return None
    most = _MOST_LOGPROBS[name]
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= most:
        raise invalid(f"{name}={short_repr(given)} is not allowed; give 0 to {most}", name)
    return functools.partial(Logprobs, given, _tokenizer(handler)[1])


def _form(body: Body) -> str | None:
    """Return the grammar of the form that an answer is to have, None for text."""
    form, path = body.pop("response_format", None), "response_format"
    text = body.pop("text", None)
    for name in text or ():
        if name != "format":
            raise Refused(400, "unsupported_value", f"text.{name} is not supported; leave it out", f"text.{name}")
    if text and text.get("format") is not None:
        form, path = text["format"], "text.format"
    return None if form is None else grammar_of(form, path)


def _check_names(handler: Any, body: Body) -> None:
    known = handler._valid_params_class.__mutable_keys__
    for name in body:
        if name not in known:
            hint = did_you_mean(name, known)
            raise Refused(400, "unknown_parameter", f"{short_repr(name)} is no parameter here{hint}", name)


def no_model(name: str, served: str) -> Refused:
    """Return the error for a model that is not served."""
    message = f"model={short_repr(name)} is not served; give {served!r}, or leave it out"
    return Refused(404, "model_not_found", message, "model")


def _check_prompt(handler: Any, body: Body) -> None:
    if isinstance(handler, ChatCompletionHandler):
        forms.check_messages(body.get("messages"))
    elif isinstance(handler, CompletionHandler):
        forms.need(body.get("prompt"), str, "prompt", "a string")
    else:
        forms.check_input(body.get("input"))


def _check_unsupported(handler: Any, body: Body) -> None:
    taken = next(fields for kind, fields in _TAKEN_BY.items() if isinstance(handler, kind))
    for name in sorted((handler._unused_fields | _TRANSFORMERS) & body.keys() - taken - _TAKEN):
        neutral = _NEUTRAL.get(name, ())
        value = body[name]
        if value is not None and not any(type(value) is type(given) and value == given for given in neutral):
            allowed = f"give {' or '.join(map(repr, neutral))}, or leave it out" if neutral else "leave it out"
            raise Refused(400, "unsupported_value", f"{name}={short_repr(value)} is not supported; {allowed}", name)
    if body.get("tool_choice") == "none":
        body.pop("tools", None)


def _check_numbers(body: Body) -> None:
    for name, (kind, fits, allowed) in _NUMBERS.items():
        value = body.get(name)
        if value is None:
            continue
        kinds, form = ((int, float), "a number") if kind is float else (int, "an integer")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise invalid(f"{name}={short_repr(value)} is not {form}", name)
        if not fits(value):
            raise invalid(f"{name}={short_repr(value)} is not allowed; give {allowed}", name)


def _stops(body: Body) -> tuple[str, ...]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > _MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        allowed = f"give a string, or a list of up to {_MOST_STOPS}"
        raise invalid(f"stop={short_repr(stops)} is not allowed; {allowed}", "stop")
    body["stop"] = stops or None
    return tuple(stops)


def _biases(given: Mapping[str, Any]) -> dict[str, float]:
    for token, bias in given.items():
        shown = f"logit_bias={{{short_repr(token)}: {short_repr(bias)}}}"
        if not token.isdecimal() or isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise invalid(f"{shown} is not a token id and a number", "logit_bias")
        if not -100 <= bias <= 100:
            raise invalid(f"{shown} is not allowed; give -100 to 100", "logit_bias")
    return {token: float(bias) for token, bias in given.items()}


class Penalties(LogitsProcessor):
    """Subtracts OpenAI's presence and frequency penalties from the logits of tokens that were generated before."""

    def __init__(self, length: int, presence: float, frequency: float) -> None:
        self.length, self.presence, self.frequency = length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.length :]
        counts = scores.new_zeros(scores.shape).scatter_add_(1, new, scores.new_ones(new.shape))
        return scores - self.frequency * counts - self.presence * (counts > 0)
