"""Answers of /v1/responses as OpenAI's clients expect them.

Each item has its own index, an answer of calls has no empty text as well, and one that `max_output_tokens` cut
says so: transformers' answers do none of this. Not handled: answers in the background.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from river_compile.cli.serving.choices import Events, chunks_of
from river_compile.cli.serving.errors import Refused
from river_compile.cli.serving.requests import Asked

_STARTS = ("response.output_item.added", "response.content_part.added")


def finished(answer: dict[str, Any], asking: Asked) -> dict[str, Any]:
    """Return a response of transformers', changed in place to what was asked and how it ended."""
    if asking.calls is not None:
        answer["tool_choice"] = asking.calls.choice
    if answer["status"] != "completed":
        return answer
    calls = asking.calls is not None or any(item["type"] == "function_call" for item in answer["output"])
    answer["output"] = [item for item in answer["output"] if not (calls and _is_empty(item))]
    if asking.ending.cut:
        answer |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        for item in answer["output"]:
            _tell_cut(item)
    return answer


def _is_empty(item: dict[str, Any]) -> bool:
    return item["type"] == "message" and not any(part["text"] for part in item["content"])


def _tell_cut(item: dict[str, Any]) -> None:
    if item["type"] == "message":  # (calls are complete, or left out)
        item["status"] = "incomplete"


async def edited_events(events: Events, asking: Asked) -> Events:
    """Yield the events of a response, changed like :func:`finished`."""
    edit = _Edit(asking)
    async with contextlib.aclosing(events):
        async for event in events:
            found = [kept for chunk in chunks_of(event) for kept in edit(chunk)]
            if found:
                yield "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in found)


class _Edit:
    """What the events of one response have shown so far."""

    def __init__(self, asking: Asked) -> None:
        self._asking = asking
        self._places: dict[str, int] = {}  # of items, by id
        self._texts: set[str] = set()  # messages that have ended
        self._held: list[dict[str, Any]] = []  # the start of a message that has no text yet
        self._calls, self._number = asking.calls is not None, 0

    def __call__(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events in place of one."""
        item = chunk.get("item", {})
        name = chunk.get("item_id") or item.get("id")
        is_text = str(name).startswith("msg_")
        if item.get("type") == "function_call":
            self._calls = True
        if is_text and name in self._texts:  # transformers ends a message again where the last item is another
            return []
        if is_text and chunk["type"] in _STARTS:
            self._held.append(chunk)
            return []
        if is_text and self._held and self._calls and not chunk["type"].endswith(".delta"):
            return []
        if chunk["type"] == "response.output_item.done" and is_text:
            self._texts.add(name)
            if self._asking.ending.cut:
                _tell_cut(item)
        if "response" in chunk:
            response = finished(chunk["response"], self._asking)
            if chunk["type"] == "response.completed":
                chunk["type"] = f"response.{response['status']}"
        found = [chunk]
        if is_text:
            found, self._held = [*self._held, chunk], []
        return [self._numbered(event) for event in found]

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        event["sequence_number"] = self._number
        self._number += 1
        if "output_index" in event:
            name = event.get("item_id") or event["item"]["id"]
            event["output_index"] = self._places.setdefault(name, len(self._places))
        return event


async def response_of(events: Events) -> dict[str, Any]:
    """Return the response that events end with; raise Refused for an error among them."""
    async with contextlib.aclosing(events):
        async for event in events:
            for chunk in chunks_of(event):
                if chunk["type"] == "error":
                    raise Refused(500, "internal_error", chunk["message"])
                last = chunk
    response: dict[str, Any] = last["response"]
    return response
