"""What clients of `river serve` send is taken with OpenAI's meaning, or refused with the name of what is wrong."""

import json

import jinja2
import pytest
import transformers

for package in ("openai", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server's packages are not installed")

from tests.support.serving import CHAT, HELLO, post  # noqa: E402

PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}


def user(content, **more):
    return {"messages": [{"role": "user", "content": content, **more}]}


def is_refused(found, code, param):
    """Whether an answer is 400 in OpenAI's form, and names the field."""
    status, answer = found
    error = answer["error"]
    assert (status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error"), answer
    assert param is None or param in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": [{"content": "hi"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat/completions", user(None), "messages[0].content"),
        ("chat/completions", user([{"text": "hi"}]), "messages[0].content[0].type"),
        ("chat/completions", user([{"type": "text"}]), "messages[0].content[0].text"),
        ("completions", {}, "prompt"),
        ("responses", {}, "input"),
        ("responses", {"input": [{"role": "user"}]}, "input[0].content"),
        ("responses", {"input": [{"role": "user", "content": "x"}, {**CALL, "name": None}]}, "input[1].name"),
    ],
)
def test_what_is_missing_is_named(served, path, body, param):
    is_refused(served.asks(path, **body), "missing_required_parameter", param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": "hi"}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": ["hi"]}, "messages[0]"),
        ("chat/completions", user([]), "messages[0].content"),
        ("chat/completions", user([PICTURE]), "messages[0].content[0].type"),
        ("chat/completions", user([{"type": "refusal"}]), "messages[0].content[0].type"),
        ("chat/completions", user("", tool_calls=[3]), "messages[0].tool_calls[0]"),
        (
            "chat/completions",
            user("", tool_calls=[{"function": {"arguments": "{"}}]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        ("completions", {"prompt": 3}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": "x", "suffix": 3}, "suffix"),
        ("responses", {"input": {}}, "input"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": [3]}, "input[0]"),
        ("responses", {"input": [CALL]}, "input[0].type"),
        ("responses", {"input": "x", "instructions": 3}, "instructions"),
    ],
)
def test_what_is_of_another_form_is_named(served, path, body, param):
    is_refused(served.asks(path, **body), "invalid_value", param)


def test_an_unknown_field_is_named(served):
    is_refused(served.asks(**HELLO, temprature=1), "unknown_parameter", "temprature")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *[("chat/completions", field) for field in (
            {"modalities": ["audio"]},
            {"reasoning_effort": "high"}, {"function_call": {"name": "f"}},
            {"generation_config": "{}"},
        )],
        *[("completions", field) for field in ({"echo": True}, {"best_of": 2})],
        ("responses", {"previous_response_id": "x"}),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(served, path, field):
    body = {"completions": {"prompt": "hello"}, "responses": {"input": "hello"}}.get(path, HELLO)
    is_refused(served.asks(path, **body, **field), "unsupported_value", next(iter(field)))


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "return_tensors"])
def test_a_template_gets_no_arguments_of_the_tokenizer(served, name):
    found = served.asks(**HELLO, chat_template_kwargs={name: False})
    is_refused(found, "unsupported_value", f"chat_template_kwargs.{name}")


@pytest.mark.parametrize(
    "field",
    [
        {"logit_bias": {"a": 1}}, {"logit_bias": {"5": 101}}, {"logit_bias": [5]}, {"logit_bias": {"5": float("nan")}},
        {"presence_penalty": 3}, {"frequency_penalty": "x"}, {"stop": ["a"] * 5}, {"stop": 3}, {"stream": "yes"},
        {"max_tokens": True}, {"max_tokens": 1.5}, {"max_tokens": 0}, {"max_tokens": 10**400}, {"max_tokens": "many"},
        {"max_completion_tokens": -1}, {"seed": 2**70}, {"seed": -(2**63) - 1}, {"seed": 1.5}, {"top_p": 3},
        {"top_p": 0}, {"temperature": float("inf")}, {"temperature": float("nan")}, {"temperature": -1},
        {"temperature": 10**400}, {"model": 3}, {"tools": {}}, {"chat_template_kwargs": []},
        {"logit_bias": {"257": 1}},
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named(served, field):
    found = served.asks(**{**HELLO, **field})
    is_refused(found, "invalid_value", next(iter(field)))


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), None])
def test_the_largest_seeds_are_taken(served, seed):
    status, answer = served.asks(**{**HELLO, "temperature": 1}, seed=seed)
    assert status == 200, answer


def test_the_lowest_temperatures_are_greedy(served):
    assert served.text("hello", temperature=1e-40, seed=1) == served.text("hello")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_is_its_clients_error(served, stream):
    """The next client is answered."""
    assert post(served, "hello", stream=stream, temperature=-1).getresponse().status == 400
    assert served.text("hello", 1)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff", b'{"messages": "\xed\xa0\x80"}', "{}".encode("utf-16"), b"[" * 60_000,
     b'{"seed": %b}' % (b"1" * 5000)],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(served, body):
    is_refused(served.raw("POST", CHAT, body), "invalid_json", None)


def test_half_of_a_surrogate_pair_is_refused_by_its_place(served):
    is_refused(served.asks(**user("a\ud800")), "invalid_value", "messages[0].content")
    is_refused(
        served.asks(**user([{"type": "text", "text": "\udc00"}])), "invalid_value", "messages[0].content[0].text"
    )
    is_refused(served.asks("completions", prompt="x", stop=["a", "\ud83d"]), "invalid_value", "stop[1]")
    status, answer = served.asks(**user("\U0001f600"), max_tokens=2)  # json.dumps writes it as a pair
    assert status == 200, answer
    status, answer = served.asks(**HELLO, **{"\ud800": 1})
    assert status == 400, answer


def test_a_body_that_is_nested_too_deeply_is_refused(served):
    deep = "[" * 500 + "]" * 500
    body = json.dumps({**HELLO, "metadata": "DEEP"}).replace('"DEEP"', deep)
    is_refused(served.raw("POST", CHAT, body), "invalid_value", "metadata")


@pytest.mark.parametrize(
    ("raised", "status", "code", "param"),
    [
        (jinja2.TemplateError("roles must alternate"), 400, "invalid_value", "messages"),
        (RuntimeError("out of cheese"), 500, "internal_error", None),
    ],
)
def test_an_error_within_has_openais_form(served, monkeypatch, raised, status, code, param):
    """The client gets the message of the model's template, and none from within the server."""

    def template(*_, **__):
        raise raised

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "apply_chat_template", template)
    found, answer = served.asks(**HELLO)
    assert (found, answer["error"]["code"], answer["error"]["param"]) == (status, code, param)
    assert (str(raised) in answer["error"]["message"]) == (status == 400)
