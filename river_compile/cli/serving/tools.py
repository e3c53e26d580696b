"""Answers that have to be calls of tools: their grammar, and the calls in their text.

A call has the form of Hermes and Qwen, ``{"name": ..., "arguments": ...}``, between the marks of a template that has
them. Not handled: a choice of "auto", which is the model's, and whose calls transformers' parser finds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLTokenizer

from river_compile.cli.serving.errors import Refused, invalid
from river_compile.cli.serving.forms import need
from river_compile.cli.serving.grammars import JSON_SPACES, check_schema
from river_compile.kernels.checks import short_repr

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MARKS = ("<tool_call>", "</tool_call>")
_ARGUMENTS = '"arguments": '
_CHOICES = '"none", "auto", "required", or {}'
_FORMS = ('{"type": "function", "function": {"name": ...}}', '{"type": "function", "name": ...}')  # nested and flat


@dataclass(frozen=True)
class Calls:
    """The calls that an answer has to be."""

    tools: Sequence[tuple[str, dict[str, Any]]]  # that may be called: names, and schemas of parameters
    several: bool  # whether there may be more than one call
    choice: object  # the client's `tool_choice`

    @classmethod
    def of(cls, body: dict[str, Any], flat: bool = False) -> Calls | None:
        """Return the calls that a request asks for, None if the answer may be text.

        Args:
            body: the request.
            flat: whether name and parameters stand next to the type, as in responses, or in a `function`, as in chats.

        Raises:
            Refused: `tool_choice` or a tool has another form than OpenAI's, or names a tool that is none.
        """
        choice, several = body.get("tool_choice"), body.get("parallel_tool_calls")
        if several is not None and not isinstance(several, bool):
            raise invalid(f"parallel_tool_calls={short_repr(several)} is not true or false", "parallel_tool_calls")
        if choice in (None, "none", "auto"):
            if several is False and choice != "none" and body.get("tools"):
                fix = 'give a tool_choice of "required" or a function, or leave it out'
                message = f"parallel_tool_calls=False is not supported where the model chooses; {fix}"
                raise Refused(400, "unsupported_value", message, "parallel_tool_calls")
            return None
        if choice != "required" and not isinstance(choice, dict):
            allowed = _CHOICES.format(_FORMS[flat])
            raise invalid(f"tool_choice={short_repr(choice)} is not allowed; give {allowed}", "tool_choice")
        name = None if choice == "required" else _named(choice, flat)
        tools = [_tool(tool, f"tools[{i}]", flat) for i, tool in enumerate(body.get("tools") or ())]
        tools = [tool for tool in tools if name in (None, tool[0])]
        if not tools:
            raise invalid(f"tool_choice={short_repr(name or choice)}: tools has no such function", "tool_choice")
        return cls(tools, name is None and several is not False, choice)

    def grammar(self, tokenizer: Any, vocabulary: LLTokenizer) -> str:
        """Return their grammar, for a tokenizer with the chat template."""
        opens, closes = _marks(tokenizer, vocabulary)
        lines = ["start: call" + (' ("\\n" call)*' if self.several else ""), f"call: {opens} object {closes}"]
        lines.append("object: " + " | ".join(f"function{i}" for i in range(len(self.tools))))
        for i, (name, schema) in enumerate(self.tools):
            start = json.dumps(f'{{"name": "{name}", {_ARGUMENTS}')
            lines.append(f'function{i}: {start} arguments{i} "}}"')
            lines.append(f"arguments{i}: %json {json.dumps({**schema, 'x-guidance': JSON_SPACES})}")
        return "\n".join(lines) + "\n"


def _function(holder: dict[str, Any], path: str, flat: bool) -> tuple[dict[str, Any], str]:
    """Return what has a function's name, and its place."""
    if flat and "function" not in holder:
        return holder, path
    place = f"{path}.function"
    return need(holder.get("function"), dict, place, "an object"), place


def _tool(tool: dict[str, Any], path: str, flat: bool) -> tuple[str, dict[str, Any]]:
    """Return name and parameters of a tool."""
    if tool.get("type") != "function":
        raise invalid(f"{path}.type={short_repr(tool.get('type'))} is not 'function'", f"{path}.type")
    function, place = _function(tool, path, flat)
    name = need(function.get("name"), str, f"{place}.name", "a string")
    if not _NAME.fullmatch(name):
        allowed = "give up to 64 letters, digits, dots, - or _"
        raise invalid(f"{place}.name={short_repr(name)} is not allowed; {allowed}", f"{place}.name")
    place = f"{place}.parameters"
    schema = need(function.get("parameters") or {"type": "object"}, dict, place, "a JSON schema")
    check_schema(schema, place)
    return name, schema


def _named(choice: dict[str, Any], flat: bool) -> str:
    if choice.get("type") != "function":
        shown = short_repr(choice.get("type"))
        allowed = _CHOICES.format(_FORMS[flat])
        raise invalid(f"tool_choice.type={shown} is not allowed; give {allowed}", "tool_choice.type")
    function, place = _function(choice, "tool_choice", flat)
    name: str = need(function.get("name"), str, f"{place}.name", "a string")
    return name


def _marks(tokenizer: Any, vocabulary: LLTokenizer) -> tuple[str, str]:
    """Return what is around a call, in Lark's terms."""
    known = tokenizer.get_vocab()
    if not all(mark in str(tokenizer.chat_template) for mark in _MARKS):
        return "", ""
    terms = [
        mark if mark in known and vocabulary.is_special_token(known[mark]) else json.dumps(mark) for mark in _MARKS
    ]
    return f'{terms[0]} "\\n"', f'"\\n" {terms[1]}'


class CallParser:
    """Finds the calls in a text of :meth:`Calls.grammar` (transformers' interface of `ResponseParser`)."""

    initial_events: tuple[dict[str, Any], ...] = ()

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return an event for each call that ends in another piece of the text."""
        self._text += text
        events = []
        while "}" in text and (call := self._next()):
            events.append({"type": "region_close", "field": "tool_calls", "value": {"function": call}})
        return events

    def _next(self) -> dict[str, str] | None:
        start = self._text.find("{")
        try:
            call, end = json.JSONDecoder().raw_decode(self._text, max(start, 0))
        except ValueError:
            return None
        text, self._text = self._text[start:end], self._text[end:]
        arguments = text.partition(_ARGUMENTS)[2].removesuffix("}")
        return {"name": call["name"], "arguments": arguments}

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return no more events: a call that was cut at `max_tokens` is none."""
        return {}, []
