"""The form of what a client sends: JSON, and the texts in it; errors name the place, such as ``messages[0].content``.

Not handled: fields that no text of the prompt comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from river_compile.cli.serving.errors import Refused, invalid
from river_compile.kernels.checks import short_repr

_DEEPEST = 100  # lists and objects in each other; what is deeper ends Python's stack in some template or copy
_TEXTS = ("text", "input_text", "output_text")
# Types of other parts, and the field that has their content.
_MEDIA = {
    "image_url": "image_url",
    "input_image": "image_url",
    "input_audio": "input_audio",
    "audio_url": "audio_url",
    "video_url": "video_url",
}
_MESSAGES = 'a list of {"role": ..., "content": ...}'
_CONTENT = "a string or a list of parts"


def parsed(body: bytes) -> dict[str, Any]:
    """Return a body's JSON object; raise Refused for what is none, or has text that is no Unicode."""
    try:
        found = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(400, "invalid_json", f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, "invalid_json", f"the body {short_repr(found)} is not an object")
    for path, value, depth in _walk(found):
        if depth > _DEEPEST:
            raise invalid(f"{path.partition('[')[0]} is nested more than {_DEEPEST} times", path.partition("[")[0])
        if isinstance(value, str) and not _is_unicode(value):
            raise invalid(f"{path} has half of a surrogate pair, {value!a:.100}; send whole characters", path)
    return found


def _walk(body: dict[str, Any]) -> Iterator[tuple[str, object, int]]:
    """Yield all values with their places and depths, without recursion; keys count as values."""
    waiting: list[tuple[str, object, int]] = [("", body, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        yield path, value, depth
        if depth > _DEEPEST:
            continue
        if isinstance(value, dict):
            for key, entry in value.items():
                place = f"{path}.{key}" if path else key
                yield ascii(place), key, depth
                waiting.append((place, entry, depth + 1))
        elif isinstance(value, list):
            waiting.extend((f"{path}[{i}]", entry, depth + 1) for i, entry in enumerate(value))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need(value: object, kind: type | tuple[type, ...], path: str, form: str) -> Any:
    """Return a value of a kind; refuse others, and what is missing, by its place."""
    if value is None:
        raise Refused(400, "missing_required_parameter", f"{path} is missing; give {form}", path)
    if not isinstance(value, kind):
        raise invalid(f"{path}={short_repr(value)} is not {form}", path)
    return value


def json_object(text: str, path: str) -> dict[str, Any]:
    """Return the JSON object that a string has; refuse others by their place."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(f"{path}={short_repr(text)} is not a JSON object in a string", path)
    return found


def check_messages(messages: object) -> None:
    """Refuse what is no conversation in the form of chat completions."""
    if not need(messages, list, "messages", _MESSAGES):
        raise invalid(f"messages=[] is not {_MESSAGES}", "messages")
    assert isinstance(messages, list)
    for i, message in enumerate(messages):
        _check_message(need(message, dict, f"messages[{i}]", "an object"), f"messages[{i}]")


def check_input(given: object) -> None:
    """Refuse what is no `input` in the form of responses: a text, parts of one message, or messages and calls."""
    items = need(given, (str, list), "input", "a string or a list of items")
    if isinstance(items, str):
        return
    if not items:
        raise invalid("input=[] is not a string or a list of items", "input")
    for i, item in enumerate(items):
        need(item, dict, f"input[{i}]", "an object")
    if "role" not in items[0]:
        _check_content(items, "input")
        return
    for i, item in enumerate(items):
        _check_item(item, f"input[{i}]")


def _check_item(item: dict[str, Any], path: str) -> None:
    kind = item.get("type")
    if "role" in item:
        _check_message(item, path)
    elif kind == "function_call":
        for name in ("call_id", "name"):
            need(item.get(name), str, f"{path}.{name}", "a string")
        json_object(need(item.get("arguments"), str, f"{path}.arguments", "a string"), f"{path}.arguments")
    elif kind == "function_call_output":
        need(item.get("call_id"), str, f"{path}.call_id", "a string")
        _check_content(item.get("output"), f"{path}.output")
    elif kind == "reasoning":
        parts = need(item.get("content") or [], list, f"{path}.content", "a list of parts")
        for i, part in enumerate(parts):
            need(part, dict, f"{path}.content[{i}]", "an object")
            need(part.get("text"), str, f"{path}.content[{i}].text", "a string")
    else:
        raise invalid(f"{path}.type={short_repr(kind)} is not supported", f"{path}.type")


def _check_message(message: dict[str, Any], path: str) -> None:
    need(message.get("role"), str, f"{path}.role", "a string")
    calls = need(message.get("tool_calls") or [], list, f"{path}.tool_calls", "a list")
    for i, call in enumerate(calls):
        place = f"{path}.tool_calls[{i}]"
        called = need(call, dict, place, "an object")
        called = need(called.get("function") or called, dict, f"{place}.function", "an object")
        arguments = need(called.get("arguments"), (str, dict), f"{place}.function.arguments", "a JSON object")
        if isinstance(arguments, str):
            json_object(arguments, f"{place}.function.arguments")
    if not calls or message.get("content") is not None:
        _check_content(message.get("content"), f"{path}.content")


def _check_content(content: object, path: str) -> None:
    parts = need(content, (str, list), path, _CONTENT)
    if isinstance(parts, str):
        return
    if not parts:
        raise invalid(f"{path}=[] is not {_CONTENT}", path)
    for i, part in enumerate(parts):
        place = f"{path}[{i}]"
        kind = need(need(part, dict, place, "an object").get("type"), str, f"{place}.type", "a string")
        if kind in _TEXTS:
            need(part.get("text"), str, f"{place}.text", "a string")
        elif kind in _MEDIA:
            place, inside = f"{place}.{_MEDIA[kind]}", "data" if kind == "input_audio" else "url"
            medium = need(part.get(_MEDIA[kind]), (str, dict), place, "a URL")
            if isinstance(medium, dict):
                need(medium.get(inside), str, f"{place}.{inside}", "a string")
        else:
            raise invalid(f"{place}.type={short_repr(kind)} is not supported", f"{place}.type")


def check_only_text(messages: list[dict[str, Any]]) -> None:
    """Refuse images and audio for a model that reads text alone."""
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] not in _TEXTS:
                place = f"messages[{i}].content[{j}].type"
                raise invalid(
                    f"{place}={short_repr(part['type'])} is not supported: this model reads text alone", place
                )
