"""The choices of one answer: streamed next to each other, and in one piece from the same events.

Not handled: answers of /v1/responses, which have one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from openai.types import CompletionUsage

from river_compile.cli.serving.errors import Refused

_DATA = "data: "
Events = AsyncGenerator[str, None]


class Usage:
    """Adds the tokens of choices: the last one to end tells the sum."""

    def __init__(self, choices: int) -> None:
        self._left, self._tokens = choices, 0

    def add(self, usage: CompletionUsage) -> CompletionUsage | None:
        """Return the sum after the last choice, None before it."""
        self._left -= 1
        self._tokens += usage.completion_tokens
        if self._left:
            return None
        prompt = usage.prompt_tokens
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=self._tokens, total_tokens=prompt + self._tokens)


async def together(streams: Sequence[Events]) -> Events:
    """Yield the events of several streams as they come; an error ends all of them."""
    queue: asyncio.Queue[str | None] = asyncio.Queue()

    async def pump(stream: Events) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for event in stream:
                    queue.put_nowait(event)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            event = await queue.get()
            if event is None:
                running -= 1
                continue
            yield event
            if '"error": ' in event and any("error" in chunk for chunk in chunks_of(event)):
                return
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def ended(events: Events, end: str) -> Events:
    """Yield events, and an end if there is one."""
    async with contextlib.aclosing(events):
        async for event in events:
            yield event
    if end:
        yield end


def chunks_of(events: str) -> list[dict[str, Any]]:
    """Return the objects of one or several events."""
    return [json.loads(line.removeprefix(_DATA)) for line in events.split("\n\n") if line.startswith(_DATA)]


def edited(event: str, **changes: Any) -> str:
    """Return an event with changes of its choice."""
    (chunk,) = chunks_of(event)
    chunk["choices"][0] |= changes
    return f"{_DATA}{json.dumps(chunk)}\n\n"


async def collected(events: Events) -> dict[str, Any]:
    """Return the answer in one piece that events have; raise Refused for an error among them."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    async with contextlib.aclosing(events):
        async for event in events:
            for chunk in chunks_of(event):
                if "error" in chunk:
                    error = chunk["error"]
                    raise Refused(500, error["code"], error["message"])
                (part,) = chunk.pop("choices")
                _add(choices.setdefault(part["index"], {"index": part["index"], "finish_reason": None}), part)
                answer |= chunk
    answer["object"] = answer["object"].removesuffix(".chunk")
    answer["choices"] = [choices[index] for index in sorted(choices)]
    for choice in answer["choices"]:
        if "message" in choice and not choice["message"]["content"] and "tool_calls" in choice["message"]:
            choice["message"]["content"] = None
    return answer


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    for name, value in (part.get("logprobs") or {}).items():
        logprobs = choice.setdefault("logprobs", {})
        logprobs[name] = None if value is None else [*(logprobs.get(name) or ()), *value]
    if "delta" not in part:
        choice["text"] = choice.get("text", "") + part.get("text", "")
        return
    message = choice.setdefault("message", {"role": "assistant", "content": ""})
    for name in ("content", "reasoning_content"):
        if part["delta"].get(name):
            message[name] = message.get(name, "") + part["delta"][name]
    for call in part["delta"].get("tool_calls") or ():
        message.setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
