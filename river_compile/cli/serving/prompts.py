"""A request's text becomes tokens: in a thread, up to the model's context, and no longer than its client waits.

transformers' handlers do all of this in the event loop, before they wait for `generate`.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Coroutine
from typing import Any

from jinja2 import TemplateError
from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving import utils
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from river_compile.cli.serving import forms
from river_compile.cli.serving.choices import Events, Usage, collected, edited, ended, together
from river_compile.cli.serving.connections import check_client
from river_compile.cli.serving.errors import Refused, invalid
from river_compile.cli.serving.logprobs import Piece, of_chat, of_completion
from river_compile.cli.serving.requests import Asked, Body, asked, translated
from river_compile.cli.serving.responses import edited_events, finished, response_of
from river_compile.cli.serving.streams import with_errors
from river_compile.cli.shared import error_line

_PIECE = 1 << 16  # characters that are tokenized before the next look at the client
_SEAM = 64  # tokens that a cut between pieces may add at most
_UNBOUNDED = 1 << 17  # tokens, for the size of a body where a model has no maximum context
_BYTES, _MORE = 32, 1 << 16  # of JSON: for each token (a word of escaped Cyrillic has as many), and besides the prompt
_MEDIA = 32 << 20  # bytes of images and audio in one body
_Mixed: Any = object  # base of what is mixed into classes of transformers', whose methods a type checker would miss


def context_of(model: PreTrainedModel) -> int | None:
    """Return a model's maximum context length in tokens; None if it has none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def most_bytes(model: PreTrainedModel, only_text: bool) -> int:
    """Return the size beyond which a request's body cannot fit the context."""
    return _MORE + _BYTES * (context_of(model) or _UNBOUNDED) + (0 if only_text else _MEDIA)


class _Unfit(Exception):
    """A prompt that the model cannot take; :func:`prepare` names the field that it came from."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _too_long(context: int, length: str) -> _Unfit:
    return _Unfit(
        "context_length_exceeded",
        f"This model's maximum context length is {context} tokens. However, your prompt has {length} tokens. "
        f"Please shorten it to {context - 1} or fewer.",
    )


class _Bounded(_Mixed):
    """Mixed into a tokenizer's class: a long text is counted in pieces, and refused when they exceed the context.

    A text that fits is tokenized twice then, which takes far less time than its prefill.
    """

    context: int

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        for one in (text,) if isinstance(text, str) else text or ():
            if isinstance(one, str) and len(one) > _PIECE:
                self._check(one)
        check_client()
        return super().__call__(text, *args, **kwargs)

    def _check(self, text: str) -> None:
        tokens = 0
        for at in range(0, len(text), _PIECE):
            check_client()
            piece = super().__call__(text[at : at + _PIECE], add_special_tokens=False, verbose=False)
            tokens += len(piece["input_ids"]) - _SEAM
            if tokens >= self.context:
                raise _too_long(self.context, f"more than {tokens}")


def bound(processor: Any, model: PreTrainedModel) -> None:
    """Make a processor's tokenizer refuse texts beyond a model's context before they are tokenized as a whole."""
    tokenizer = getattr(processor, "tokenizer", processor)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer("")  # the first call changes its settings of padding, which no two threads may do
    context = context_of(model)
    if context is not None:
        theirs = type(tokenizer)
        tokenizer.__class__ = type(theirs.__name__, (_Bounded, theirs), {"context": context})


def _fit(config: GenerationConfig, model: PreTrainedModel, length: int) -> None:
    """Adapt a request's settings after a prompt of `length` tokens; raise _Unfit if it fills the context."""
    # As in OpenAI's API, a temperature or top_p asks for sampling; transformers wants `do_sample` too.
    theirs = model.generation_config
    if config.temperature != 0 and (config.temperature, config.top_p) != (theirs.temperature, theirs.top_p):
        config.do_sample = True
    vocabulary = model.config.get_text_config().vocab_size
    beyond = [token for tokens in config.sequence_bias or () for token in tokens if token >= vocabulary]
    if beyond:
        raise invalid(f"logit_bias has token {beyond[0]}, and the vocabulary has {vocabulary}", "logit_bias")
    if length < 1:
        raise _Unfit("invalid_value", "the prompt is empty; give at least one token")
    context = context_of(model)
    if context is None:
        return
    if length >= context:
        raise _too_long(context, str(length))
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, context - length)


class _Prepares(_Mixed):
    """Mixed into transformers' handlers: `handle_request` ends before it generates, and returns what is left to do."""

    text: str  # the field that has the prompt
    piece = "content"  # the argument of `_build_chunk_sse` that has a piece of an answer
    logprobs, collected = staticmethod(of_chat), staticmethod(collected)
    end = "data: [DONE]\n\n"  # after the last event
    # Of a copy of the handler, which answers one choice:
    choice = 0  # its index
    asking: Asked
    usage: Usage | None = None  # of all choices

    def _validate_request(self, body: Body) -> None:
        pass  # :func:`requests.translated` has

    def _streaming(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        _check_fit(super()._streaming, *args, **kwargs)
        return lambda: StreamingResponse(ended(self._events(*args, **kwargs), self.end), media_type="text/event-stream")

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        asking, whole = asked.get(), super()._non_streaming
        _check_fit(whole, *args, **kwargs)

        async def start() -> Response:
            if not asking.is_one_text:
                return JSONResponse(await self.collected(self._events(*args, **kwargs)))
            response = await whole(*args, **kwargs)
            return JSONResponse(self.finished(json.loads(response.body), asking))

        return start

    def _events(self, *args: Any, **kwargs: Any) -> Events:
        """Start all choices that the current request asks for; return the events of the answer."""
        asking = asked.get()
        usage, streams = Usage(asking.choices), []
        for index in range(asking.choices):
            one = copy.copy(self)
            one.choice, one.usage, one.asking = index, usage, asking.of_choice(index)
            before = asked.set(one.asking)
            response = super(_Prepares, one)._streaming(*args, **kwargs)
            asked.reset(before)
            streams.append(one.edited(with_errors(response.body_iterator)))
        return streams[0] if len(streams) == 1 else together(streams)

    def edited(self, events: Events) -> Events:
        """Return a choice's events as clients get them."""
        return events

    @staticmethod
    def finished(answer: dict[str, Any], asking: Asked) -> dict[str, Any]:
        """Return transformers' answer of one choice, in one piece, with its end."""
        for choice in answer["choices"]:
            choice["finish_reason"] = asking.ending.reason(choice["finish_reason"])
        return answer

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        if kwargs.get("usage") is not None and self.usage is not None:
            kwargs["usage"] = self.usage.add(kwargs["usage"])
        if kwargs.get("finish_reason") is not None:
            kwargs["finish_reason"] = self.asking.ending.reason(kwargs["finish_reason"])
        event: str = super()._build_chunk_sse(*args, **kwargs)
        piece = kwargs.get(self.piece)
        changes = {"logprobs": self.logprobs(piece.tokens)} if isinstance(piece, Piece) else {}
        return edited(event, index=self.choice, **changes) if self.choice or changes else event

    def get_processor_inputs_from_messages(self, messages: list[Body], modality: utils.Modality) -> Any:
        if modality is utils.Modality.LLM:
            forms.check_only_text(messages)
        return super().get_processor_inputs_from_messages(messages, modality)


def _check_fit(generates: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(generates).bind(*args, **kwargs).arguments
    _fit(given["gen_config"], given["model"], given["inputs"]["input_ids"].shape[-1])
    if (given["gen_config"].num_beams or 1) > 1 and not asked.get().is_one_text:
        message = "n, logprobs and tool_choice are not supported with the beam search of this model's settings"
        raise Refused(400, "unsupported_value", message)


class Chats(_Prepares, ChatCompletionHandler):
    """Answers /v1/chat/completions."""

    text = "messages"


class Completions(_Prepares, CompletionHandler):
    """Answers /v1/completions."""

    text, piece, logprobs = "prompt", "text", staticmethod(of_completion)


class Responses(_Prepares, ResponseHandler):
    """Answers /v1/responses."""

    text, end = "input", ""
    collected, finished = staticmethod(response_of), staticmethod(finished)

    def edited(self, events: Events) -> Events:
        return edited_events(events, self.asking)


def prepare(handler: Any, body: bytes, request_id: str) -> tuple[Asked, Callable[[], Any]]:
    """Check a request and tokenize its text; called in a thread.

    Args:
        handler: one of those above.
        body: JSON.
        request_id: of the answer.

    Returns:
        what it asks, and a function that starts its answer: a response or an awaitable of one.

    Raises:
        Refused: something is not allowed, or the client has gone.
    """
    given = forms.parsed(body)
    asking = translated(handler, given)
    asked.set(asking)
    try:
        return asking, _run(handler.handle_request(given, request_id))
    except _Unfit as error:
        raise Refused(400, error.code, str(error), handler.text) from None
    except TemplateError as error:
        why = f"the model's chat template refuses this conversation: {error_line(error)}"
        raise invalid(why, handler.text) from None


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise RuntimeError("transformers' handler waits for something before it generates")
