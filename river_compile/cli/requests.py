"""What a client may ask of ``river serve``: checked, put into transformers' terms, or refused by name.

Formats are those of OpenAI's API. Not handled: fields that transformers' server knows and applies itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.cli.serving import utils
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from river_compile.cli.shared import error_line
from river_compile.kernels.checks import short_repr

Body = MutableMapping[str, Any]

# Fields that transformers' server ignores: with one of these values (or null) they ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
# Those that do not change a text.
_INERT = {"metadata", "prediction", "service_tier", "store", "stream_options", "user"}
_NUMBERS = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "max_output_tokens", "seed")
_PENALTIES = ("presence_penalty", "frequency_penalty")
_MOST_STOPS = 4  # OpenAI's limit


class Refused(Exception):
    """An error for the client, in OpenAI's form."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def _invalid(message: str, status: int = 400) -> Refused:
    return Refused(status, "invalid_value", message)


async def answer_error(_: object, error: Exception) -> JSONResponse:
    """Turn an error of River, transformers, FastAPI or the model into an answer."""
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, "invalid_value", str(error.detail), error.headers)
    if isinstance(error, RequestValidationError):
        error = _invalid("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()), 422)
    refused = error if isinstance(error, Refused) else _invalid(error_line(error))
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    body = {"message": str(refused), "type": kind, "param": None, "code": refused.code}
    return JSONResponse({"error": body}, refused.status, refused.headers)


@dataclass(frozen=True)
class Asked:
    """What a request asks besides transformers' settings."""

    seed: int | None = None
    stops: tuple[str, ...] = ()  # strings that end the text, and are left out of it
    presence: float = 0.0  # penalties of OpenAI's API
    frequency: float = 0.0

    def processors(self, length: int) -> list[LogitsProcessor]:
        """Return the processors after a prompt of `length` tokens."""
        return [Penalties(length, self.presence, self.frequency)] if self.presence or self.frequency else []


NOTHING = Asked()
asked: ContextVar[Asked] = ContextVar("asked", default=NOTHING)  # by the request that this task answers


def watch(handler: Any) -> None:
    """Make a handler of texts of transformers' server check and translate what it is asked."""
    if not isinstance(handler, (ChatCompletionHandler, CompletionHandler, ResponseHandler)):
        return
    theirs, inputs = handler._validate_request, handler.get_processor_inputs_from_messages

    def validate(body: Body) -> None:
        theirs(body)
        _check_form(handler, body)
        _check_unsupported(handler._unused_fields, body)
        asked.set(_translated(body))

    def processor_inputs(messages: Sequence[Body], modality: utils.Modality) -> Any:
        if modality is utils.Modality.LLM:
            _check_only_text(messages)
        return inputs(messages, modality)

    handler._validate_request = validate
    handler.get_processor_inputs_from_messages = processor_inputs


def _check_form(handler: Any, body: Body) -> None:
    if isinstance(handler, ChatCompletionHandler):
        name, form, fits = "messages", 'a list of {"role": ..., "content": ...}', _is_messages
    elif isinstance(handler, CompletionHandler):
        name, form, fits = "prompt", "a string", lambda value: isinstance(value, str)
    else:
        name, form, fits = "input", "a string or a list of items", lambda value: isinstance(value, (str, list, dict))
    if name not in body:
        raise _invalid(f"{name} is missing; give {form}", 422)
    if not fits(body[name]):
        raise _invalid(f"{name}={short_repr(body[name])} is not {form}", 422)


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    parts = content if isinstance(content, list) else []
    return (content is None or isinstance(content, (str, list))) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) and isinstance(part.get("text", ""), str)
        for part in parts
    )


def _check_unsupported(ignored: set[str], body: Body) -> None:
    for name in sorted(ignored & body.keys() - _INERT - {*_PENALTIES}):
        neutral = _NEUTRAL.get(name, ())
        value = body[name]
        if value is not None and not any(type(value) is type(given) and value == given for given in neutral):
            allowed = f"give {' or '.join(map(repr, neutral))}, or leave it out" if neutral else "leave it out"
            raise Refused(400, "unsupported_value", f"{name}={short_repr(value)} is not supported; {allowed}")
    if body.get("tool_choice") == "none":
        body.pop("tools", None)


def _translated(body: Body) -> Asked:
    """Replace values in OpenAI's form by transformers', and return what has no place there."""
    for name in (*_NUMBERS, *_PENALTIES):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise _invalid(f"{name}={short_repr(value)} is not a number")
    penalties = [body.pop(name, None) or 0.0 for name in _PENALTIES]
    for name, value in zip(_PENALTIES, penalties, strict=True):
        if not -2 <= value <= 2:
            raise _invalid(f"{name}={value} is not allowed; give -2 to 2")
    if body.get("logit_bias") is not None:
        body["logit_bias"] = _biases(body["logit_bias"])
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _invalid(f"stop={short_repr(stops)} is not allowed; give a string, or a list of up to {_MOST_STOPS}")
    body["stop"] = stops or None
    # (A seed given to transformers would seed the whole process.)
    return Asked(body.pop("seed", None), tuple(stops), *penalties)


def _biases(given: object) -> dict[str, float]:
    if not isinstance(given, dict):
        raise _invalid(f"logit_bias={short_repr(given)} is not an object of token ids and numbers")
    for token, bias in given.items():
        if not token.isdecimal() or isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise _invalid(f"logit_bias={{{token!r}: {short_repr(bias)}}} is not a token id and a number")
        if not -100 <= bias <= 100:
            raise _invalid(f"logit_bias={{{token!r}: {bias}}} is not allowed; give -100 to 100")
    return {token: float(bias) for token, bias in given.items()}


def _check_only_text(messages: Sequence[Body]) -> None:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in ("text", "input_text", "output_text"):
                raise _invalid(
                    f"content of type {short_repr(part.get('type'))} is not supported: this model reads text alone"
                )


class Penalties(LogitsProcessor):
    """Subtracts OpenAI's presence and frequency penalties from the logits of tokens that were generated before."""

    def __init__(self, length: int, presence: float, frequency: float) -> None:
        self.length, self.presence, self.frequency = length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.length :]
        counts = scores.new_zeros(scores.shape).scatter_add_(1, new, scores.new_ones(new.shape))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Stops:
    """Cuts a text at the first of its stop strings; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = stops, "", False

    def feed(self, piece: str) -> str:
        """Return what may be shown after another piece."""
        text = "" if self.stopped else self.held + piece
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return what was held back when the text has ended."""
        held, self.held = self.held, ""
        return held

    def cut(self, text: str) -> str:
        """Return a whole text, cut."""
        return self.feed(text) + self.rest()


def prepare(config: GenerationConfig, model: Any, length: int) -> None:
    """Adapt a client's settings after a prompt of `length` tokens; raise Refused for one that is out of range."""
    # As in OpenAI's API, a temperature or top_p asks for sampling; transformers wants `do_sample` too.
    for name, fits, range_ in _RANGES:
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise _invalid(f"{name}={value} is not allowed; give {range_}")
    theirs = model.generation_config
    if config.temperature != 0 and (config.temperature, config.top_p) != (theirs.temperature, theirs.top_p):
        config.do_sample = True
    if length < 1:
        raise _invalid("the prompt is empty; give at least one token")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    if length >= context:
        raise Refused(
            400,
            "context_length_exceeded",
            f"This model's maximum context length is {context} tokens. However, your prompt has {length} tokens. "
            f"Please shorten it to {context - 1} or fewer.",
        )
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, context - length)


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("max_new_tokens", lambda value: value >= 1, "1 or more"),
    ("temperature", lambda value: value >= 0, "0 (no sampling) or more"),
    ("top_p", lambda value: 0 < value <= 1, "more than 0, up to 1"),
)
