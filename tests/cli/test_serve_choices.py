"""Choices, log-probabilities and forced tool calls of `river serve`, by the clients of OpenAI and LangChain."""

import json
import math
from typing import Literal
from urllib.request import Request, urlopen

import jsonschema
import pytest
import torch
import transformers
from pydantic import BaseModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

openai = pytest.importorskip("openai", reason="the server's packages are not installed")
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

# What follows needs those packages.
import llguidance.hf  # noqa: E402
from langchain_core.messages import HumanMessage  # noqa: E402

from river_compile.cli.serving.tools import CallParser, Calls  # noqa: E402
from tests.support.serving import HELLO, JSON, pieces, whole  # noqa: E402

SAMPLED = {"temperature": 0.9, "top_p": 0.95}


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


@pytest.fixture(scope="module")
def plain(tiny):
    """A function that returns the plain model's log-probabilities ``[count, V]`` after a prompt, and its new ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)

    def logprobs(prompt, count):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **settings)
        return torch.cat(made.logits).log_softmax(-1), made.sequences[0, ids.shape[1] :]

    logprobs.tokenizer = tokenizer
    return logprobs


def chat_of(question):
    return f"user: {question}\nassistant: "


def streamed_choices(stream):
    """Returns texts and last reasons of a stream by index, and how many chunks have usage."""
    texts, reasons, usages = {}, {}, []
    for chunk in stream:
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return texts, reasons, usages


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_is_the_text_of_its_seed(served, stream):
    expected = {i: served.text("dice", 6, seed=3 + i, **SAMPLED) for i in range(3)}
    answer = served.ask("dice", 6, seed=3, n=3, stream=stream, **SAMPLED)
    if stream:
        texts, reasons, (usage,) = streamed_choices(answer)
    else:
        texts = {choice.index: choice.message.content for choice in answer.choices}
        reasons, usage = {choice.index: choice.finish_reason for choice in answer.choices}, answer.usage
        assert [*texts] == [0, 1, 2]
    assert {i: whole(text) for i, text in texts.items()} == expected
    assert len({*expected.values()}) > 1
    assert reasons == dict.fromkeys(range(3), "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat_of("dice")), 18)


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_says_that_it_is_done(served, count):
    body = {**HELLO, "stream": True, "n": count}
    request = Request(f"{served.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": JSON})
    with urlopen(request) as answer:
        assert answer.read().endswith(b"}\n\ndata: [DONE]\n\n")


def test_completions_have_choices_too(served):
    answer = served.client.completions.create(model=served.name, prompt="ab", max_tokens=4, n=2, seed=1, **SAMPLED)
    one = served.client.completions.create(model=served.name, prompt="ab", max_tokens=4, seed=2, **SAMPLED)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert whole(answer.choices[1].text) == whole(one.choices[0].text)


def test_an_error_in_one_choice_is_the_answers(served, monkeypatch):
    def fail(self, input_ids, scores):
        raise ValueError("it is bad")

    monkeypatch.setattr("river_compile.cli.serving.requests.Penalties.__call__", fail)
    with pytest.raises(openai.APIError, match="it is bad"):
        served.ask("hello", presence_penalty=1, n=2)
    with pytest.raises(openai.APIError, match="it is bad"):
        pieces(served.ask("hello", presence_penalty=1, n=2, stream=True))
    monkeypatch.undo()
    served.until_free()
    assert served.text("hello")


def check_tokens(entries, expected, top):
    """Whether entries of a chat's answer have the plain model's numbers."""
    rows, tokens = expected
    assert len(entries) == len(tokens)
    for entry, row, token in zip(entries, rows, tokens.tolist(), strict=True):
        assert math.isclose(entry.logprob, row[token], abs_tol=1e-4)
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert not top or entry.top_logprobs[0].bytes == entry.bytes  # the answer is greedy


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_are_the_plain_models(served, plain, stream, top):
    answer = served.ask("hello", 12, logprobs=True, top_logprobs=top, stream=stream)
    if stream:
        chunks = [*answer]
        entries = [e for c in chunks for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else ())]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
        entries, text = answer.choices[0].logprobs.content, answer.choices[0].message.content
    check_tokens(entries, plain(chat_of("hello"), 12), top)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="ignore") == whole(text).replace(
        "\ufffd", ""
    )


def test_penalties_and_temperatures_leave_log_probabilities_as_they_are(served, plain):
    answer = served.ask("hello", 1, logprobs=True, temperature=0.5, presence_penalty=1, seed=2)
    (entry,) = answer.choices[0].logprobs.content
    rows, _ = plain(chat_of("hello"), 1)
    shown = bytes_to_unicode()[entry.bytes[0]]
    assert entry.logprob == pytest.approx(float(rows[0, plain.tokenizer.get_vocab()[shown]]), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_name_tokens_by_place(served, plain, stream):
    settings = {"model": served.name, "prompt": "ab", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    answer = served.client.completions.create(**settings, stream=stream)
    parts = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    found = [part.logprobs for part in parts if part.logprobs]
    rows, tokens = plain("ab", 6)
    numbers = [number for part in found for number in part.token_logprobs]
    assert numbers == pytest.approx([float(row[token]) for row, token in zip(rows, tokens, strict=True)], abs=1e-4)
    assert all(len(top) == 2 for part in found for top in part.top_logprobs)
    assert all(token in top for part in found for token, top in zip(part.tokens, part.top_logprobs, strict=True))
    places = [place for part in found for place in part.text_offset]
    assert places == sorted(places)
    assert places[0] == 0


def test_tokens_of_a_stop_string_have_no_log_probabilities(served):
    """Its first character is held back, and dropped with its token."""
    letters = {"logit_bias": {str(token): 60 for token in range(66, 90)}, "presence_penalty": 2}
    text = served.text("hello", 12, **letters)
    assert text.index(text[4:6]) == 4
    stop = text[4:6]
    choice = served.ask("hello", 12, logprobs=True, stop=stop, **letters).choices[0]
    assert choice.message.content == text[:4]
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content


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
        ("chat/completions", {"n": 0}, "invalid_value", "n"),
        ("chat/completions", {"n": 4}, "invalid_value", "n"),
        ("chat/completions", {"n": True}, "invalid_value", "n"),
        ("completions", {"n": "2"}, "invalid_value", "n"),
        ("chat/completions", {"logprobs": 1}, "invalid_value", "logprobs"),
        ("chat/completions", {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ("completions", {"logprobs": 6}, "invalid_value", "logprobs"),
        ("completions", {"logprobs": True}, "invalid_value", "logprobs"),
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
        ("responses", {"tool_choice": "required"}, "unsupported_value", "tool_choice"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named(served, path, field, code, param):
    body = {"completions": {"prompt": "hello"}, "responses": {"input": "hello"}}.get(path, HELLO)
    status, answer = served.asks(path, **body, **field)
    error = answer["error"]
    assert (status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error"), answer
    assert param in error["message"]


@pytest.fixture
def chain(served):
    """LangChain's chat model of the server."""
    return langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model=served.name, temperature=0, max_tokens=400, max_retries=0
    )


def test_langchain_answers_and_streams(served, chain):
    short = chain.bind(max_tokens=8)
    answer = short.invoke("hello")
    assert whole(answer.content) == served.text("hello")
    assert answer.usage_metadata["output_tokens"] == 8
    parts = [*short.stream("hello")]
    assert whole("".join(part.content for part in parts)) == served.text("hello")


def test_langchain_gets_objects_by_schema_and_by_call(chain):
    assert chain.with_structured_output(Weather, method="json_schema").invoke("hello").days in (1, 2, 30)
    assert chain.with_structured_output(Weather, method="function_calling").invoke("hello").sky in ("clear", "grey")


def test_langchain_calls_tools(chain):
    answer = chain.bind_tools([Weather, Noon], tool_choice="any", parallel_tool_calls=False).invoke("hello")
    (call,) = answer.tool_calls
    assert {"Weather": Weather, "Noon": Noon}[call["name"]].model_validate(call["args"])
    parts = chain.bind_tools([Noon], tool_choice="Noon").stream("hello")
    assert [call["name"] for part in parts for call in part.tool_call_chunks] == ["Noon"]


def test_langchain_gets_log_probabilities(chain):
    answer = chain.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke("hello")
    assert [len(entry["top_logprobs"]) for entry in answer.response_metadata["logprobs"]["content"]] == [2, 2, 2]


def test_langchain_gets_several_choices(served, chain):
    made = chain.generate([[HumanMessage("dice")]], n=2, seed=3, max_tokens=6, **SAMPLED)
    assert [whole(g.text) for g in made.generations[0]] == [
        served.text("dice", 6, seed=seed, **SAMPLED) for seed in (3, 4)
    ]
