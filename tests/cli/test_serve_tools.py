"""Forced tool calls of `river serve`, and their ends, by the clients of OpenAI and LangChain."""

import asyncio
import json
from typing import Literal

import jsonschema
import pytest
import transformers
from pydantic import BaseModel

openai = pytest.importorskip("openai", reason="the server's packages are not installed")
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

# What follows needs those packages.
import llguidance.hf  # noqa: E402
from transformers.cli.serving.response import _ResponseStreamBuilder, compute_usage  # noqa: E402

from river_compile.cli.serving.choices import chunks_of  # noqa: E402
from river_compile.cli.serving.requests import Asked, Ending  # noqa: E402
from river_compile.cli.serving.responses import edited_events  # noqa: E402
from river_compile.cli.serving.tools import CallParser, Calls  # noqa: E402
from tests.support.serving import HELLO  # noqa: E402


class Weather(BaseModel):
    """Says the weather."""

    sky: Literal["clear", "grey"]
    days: Literal[1, 2, 30]


class Noon(BaseModel):
    """Waits until noon."""

    day: Literal["today", "tomorrow"]


def tool(kind):
    return {"type": "function", "function": {"name": kind.__name__, "parameters": kind.model_json_schema()}}


TOOLS = [tool(Weather), tool(Noon)]
NAMED = {"type": "function", "function": {"name": "Noon"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "names"), [("required", {"Weather", "Noon"}), (NAMED, {"Noon"})])
def test_a_forced_call_is_parsed(served, stream, choice, names):
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answer = served.ask("hello", 100, stream=stream, **options)
    if stream:
        chunks = [c.choices[0] for c in answer]
        assert not any(c.delta.content for c in chunks)
        (call,) = [call for c in chunks for call in c.delta.tool_calls or ()]
        assert call.index == 0
        reason = chunks[-1].finish_reason
    else:
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].message.content is None
        reason = answer.choices[0].finish_reason
    assert call.function.name in names
    kind = {"Weather": Weather, "Noon": Noon}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), kind.model_json_schema())
    assert reason == "tool_calls"
    assert call.id


# One call of a fixed length, after which a list of calls may continue.
FIXED = {"type": "function", "function": {"name": "f", "parameters": {"enum": [7]}}}
ONE_CALL = len('{"name": "f", "arguments": 7}')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("most", "calls", "reason"),
    [(ONE_CALL - 1, 0, "length"), (ONE_CALL, 1, "length"), (ONE_CALL + 1, 1, "tool_calls")],
)
def test_a_call_has_its_end_only_if_the_text_has(served, stream, most, calls, reason):
    """The end is one more token."""
    options = {"tools": [FIXED], "tool_choice": "required", "parallel_tool_calls": False}
    answer = served.ask("hello", most, stream=stream, **options)
    if stream:
        choices = [c.choices[0] for c in answer]
        found = [call for c in choices for call in c.delta.tool_calls or ()]
    else:
        choices = answer.choices
        found = choices[0].message.tool_calls or []
    assert (len(found), choices[-1].finish_reason) == (calls, reason)


def test_a_list_of_calls_that_is_cut_says_so(served):
    """A text that must not end continues with calls."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(served.name)
    more = {"logit_bias": {str(tokenizer.eos_token_id): -100}}
    choice = served.ask("hello", 3 * ONE_CALL, tools=[FIXED], tool_choice="required", **more).choices[0]
    assert (len(choice.message.tool_calls), choice.finish_reason) == (2, "length")


def flat(tool):
    return {"type": "function", **tool["function"]}


FLAT = [flat(tool) for tool in TOOLS]


@pytest.mark.parametrize(("choice", "names"), [("required", {"Weather", "Noon"}), (flat(NAMED), {"Noon"})])
def test_responses_have_forced_calls(served, choice, names):
    """In one piece, and as OpenAI's client puts a stream together."""
    asked = {"model": served.name, "input": "hello", "temperature": 0, "max_output_tokens": 100}
    asked |= {"tools": FLAT, "tool_choice": choice, "parallel_tool_calls": False}
    whole = served.client.responses.create(**asked)
    with served.client.responses.stream(**asked) as stream:
        events = [*stream]
        streamed = stream.get_final_response()
    for answer in (whole, streamed):
        (call,) = answer.output
        assert (call.type, call.status, answer.status) == ("function_call", "completed", "completed")
        assert call.name in names
        kind = {"Weather": Weather, "Noon": Noon}[call.name]
        jsonschema.validate(json.loads(call.arguments), kind.model_json_schema())
        assert call.call_id
    assert whole.output[0].arguments == streamed.output[0].arguments
    assert json.loads(whole.model_dump_json())["tool_choice"] == choice
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert {event.output_index for event in events if hasattr(event, "output_index")} == {0}
    assert not any(event.type.startswith("response.output_text") for event in events)


def test_responses_whose_calls_are_cut_are_incomplete(served):
    asked = {"model": served.name, "input": "hello", "temperature": 0, "tools": [flat(FIXED)]}
    asked["tool_choice"] = "required"
    for most, calls in ((5, 0), (ONE_CALL, 1)):
        whole = served.client.responses.create(**asked, max_output_tokens=most)
        last = [*served.client.responses.create(**asked, max_output_tokens=most, stream=True)][-1]
        assert last.type == "response.incomplete"
        for answer in (whole, last.response):
            assert [item.type for item in answer.output] == ["function_call"] * calls
            assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


async def _events(builder):
    """Events of an answer whose model chose to write a text and two calls, as transformers' handler makes them."""
    yield "".join(builder.start_response())
    yield "".join([*builder.start_message(), *builder.text_delta("I ask.")])
    yield "".join([*builder.finish_message(), *builder.tool_call("call_0", "f", "{}")])
    yield "".join(builder.tool_call("call_1", "g", "{}"))
    yield "".join(builder.start_message())
    yield "".join(builder.finish_message())
    yield "".join(builder.completed(compute_usage(1, 9)))


@pytest.mark.parametrize("cut", [False, True])
def test_items_of_a_response_have_their_places(cut):
    builder = _ResponseStreamBuilder(
        request_id="1",
        response_defaults={
            "id": "resp_1", "created_at": 1.0, "model": "m", "object": "response", "tools": [],
            "parallel_tool_calls": True, "tool_choice": "auto",
        },
    )  # fmt: skip

    async def collect():
        return [event async for event in edited_events(_events(builder), Asked(ending=Ending(cut)))]

    events = [event for part in asyncio.run(collect()) for event in chunks_of(part)]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    places = [(e["output_index"], e["item"]["type"]) for e in events if e["type"] == "response.output_item.done"]
    assert places == [(0, "message"), (1, "function_call"), (2, "function_call")]
    assert "".join(event["text"] for event in events if event["type"] == "response.output_text.done") == "I ask."
    answer = events[-1]["response"]
    assert [item["type"] for item in answer["output"]] == [kind for _, kind in places]
    assert (events[-1]["type"], answer["status"]) == (
        ("response.incomplete", "incomplete") if cut else ("response.completed", "completed")
    )


def test_a_call_that_failed_is_an_error_of_responses(served, monkeypatch):
    def fail(self, input_ids, scores):
        raise ValueError("it is bad")

    monkeypatch.setattr("river_compile.cli.serving.grammars.Grammar.__call__", fail)
    status, answer = served.asks("responses", input="hello", tools=FLAT, tool_choice="required")
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "it is bad" in answer["error"]["message"]


def test_each_choice_has_its_call(served):
    answer = served.ask("hello", 100, n=2, seed=1, temperature=1.5, tools=TOOLS, tool_choice=NAMED)
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        Noon.model_validate_json(call.function.arguments)


def test_a_call_that_is_cut_is_none(served):
    choice = served.ask("hello", 5, tools=TOOLS, tool_choice="required").choices[0]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")


def test_a_templates_marks_are_around_several_calls(served):
    """Of a tokenizer that has one of the marks as a special token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(served.name)
    tokenizer.add_tokens("<tool_call>", special_tokens=True)
    tokenizer.chat_template += "<tool_call></tool_call>"
    vocabulary = llguidance.hf.from_tokenizer(tokenizer)
    calls = Calls.of({"tools": TOOLS, "tool_choice": "required"})
    matcher = llguidance.LLMatcher(vocabulary, calls.grammar(tokenizer, vocabulary))
    texts = [
        '{"name": "Noon", "arguments": {"day": "today"}}',
        '{"name": "Weather", "arguments": {"sky":"grey","days":2}}',
    ]
    text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in texts)
    for token in tokenizer.encode(text):
        assert matcher.consume_token(token), text
    assert matcher.is_accepting()
    parser = CallParser()
    found = [event["value"]["function"] for character in text for event in parser.feed(character)]
    assert found == [
        {"name": "Noon", "arguments": '{"day": "today"}'}, {"name": "Weather", "arguments": '{"sky":"grey","days":2}'}
    ]  # fmt: skip


NO_NAME = {"type": "function", "function": {"parameters": {}}}


@pytest.mark.parametrize(
    ("path", "field", "code", "param"),
    [
        ("chat/completions", {"tool_choice": "any"}, "invalid_value", "tool_choice"),
        ("chat/completions", {"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ("chat/completions", {"tool_choice": NAMED, "tools": TOOLS[:1]}, "invalid_value", "tool_choice"),
        ("chat/completions", {"tool_choice": {"type": "x"}, "tools": TOOLS}, "invalid_value", "tool_choice.type"),
        ("chat/completions", {"tool_choice": {"type": "function"}}, "missing_required_parameter",
         "tool_choice.function"),
        ("chat/completions", {"tool_choice": "required", "tools": [NO_NAME]}, "missing_required_parameter",
         "tools[0].function.name"),
        ("chat/completions", {"tool_choice": "required", "tools": [{"type": "x"}]}, "invalid_value", "tools[0].type"),
        ("chat/completions", {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f",
         "parameters": {"type": "nothing"}}}]}, "invalid_json_schema", "tools[0].function.parameters"),
        ("chat/completions", {"tools": TOOLS, "parallel_tool_calls": False}, "unsupported_value",
         "parallel_tool_calls"),
        ("responses", {"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ("responses", {"tool_choice": {"type": "function"}, "tools": FLAT}, "missing_required_parameter",
         "tool_choice.name"),
        ("responses", {"tool_choice": "required", "tools": [{"type": "function"}]}, "missing_required_parameter",
         "tools[0].name"),
        ("responses", {"tools": FLAT, "parallel_tool_calls": False}, "unsupported_value", "parallel_tool_calls"),
    ],
)  # fmt: skip
def test_a_tool_that_is_not_allowed_is_named(served, path, field, code, param):
    body = {"input": "hello"} if path == "responses" else HELLO
    status, answer = served.asks(path, **body, **field)
    error = answer["error"]
    assert (status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error"), answer
    assert param in error["message"]


def test_langchain_gets_objects_by_schema_and_by_call(chain):
    assert chain.with_structured_output(Weather, method="json_schema").invoke("hello").days in (1, 2, 30)
    assert chain.with_structured_output(Weather, method="function_calling").invoke("hello").sky in ("clear", "grey")


def test_langchain_calls_tools(chain):
    answer = chain.bind_tools([Weather, Noon], tool_choice="any", parallel_tool_calls=False).invoke("hello")
    (call,) = answer.tool_calls
    assert {"Weather": Weather, "Noon": Noon}[call["name"]].model_validate(call["args"])
    parts = chain.bind_tools([Noon], tool_choice="Noon").stream("hello")
    assert [call["name"] for part in parts for call in part.tool_call_chunks] == ["Noon"]


def test_langchain_calls_tools_by_responses(served):
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model=served.name, temperature=0, max_tokens=400, max_retries=0,
        use_responses_api=True,
    )  # fmt: skip
    bound = chat.bind_tools([Noon], tool_choice="Noon")
    (call,) = bound.invoke("hello").tool_calls
    assert Noon.model_validate(call["args"])
    assert [part["name"] for made in bound.stream("hello") for part in made.tool_call_chunks if part["name"]] == [
        "Noon"
    ]
