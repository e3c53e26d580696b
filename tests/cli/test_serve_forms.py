"""Answers of `river serve` in JSON, by OpenAI's client: the text of the plain model under the same grammar."""

import json
from typing import Literal

import jsonschema
import pytest
import torch
import transformers
from pydantic import BaseModel

openai = pytest.importorskip("openai", reason="the server's packages are not installed")

# What follows needs those packages.
from river_compile.cli.serving.grammars import Grammar, grammar_of, vocabulary_of  # noqa: E402
from tests.support.serving import HELLO, held, pieces, post  # noqa: E402

MOST = 900  # tokens, which are bytes: a random model writes as many spaces as it may
_SCHEMA = "response_format.json_schema.schema"


class Weather(BaseModel):
    """What the tiny model, which would write letters for ever, can end."""

    sky: Literal["clear", "grey", "black"]
    wet: bool
    days: list[Literal[1, 2, 30]]


SCHEMA = {**Weather.model_json_schema(), "additionalProperties": False}
SCHEMA["properties"]["days"]["maxItems"] = 3
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def plain(tiny):
    """A function that returns the plain model's text under the grammar."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)

    def text(question):
        ids = tokenizer(f"user: {question}\nassistant: ", return_tensors="pt")["input_ids"]
        vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
        grammar = Grammar(grammar_of(FORM, "response_format"), vocabulary)
        options = {"max_new_tokens": MOST, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[grammar], **options)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    return text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_schema_and_is_the_plain_models(served, plain, stream):
    answer = served.ask("hello", MOST, response_format=FORM, stream=stream)
    if stream:
        found = "".join(pieces(answer))
    else:
        found = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(found), SCHEMA)
    assert found == plain("hello")


def test_the_clients_own_parser_gets_an_object(served):
    messages = [{"role": "user", "content": "hello"}]
    answer = served.client.chat.completions.parse(
        model=served.name, messages=messages, max_tokens=300, temperature=0, response_format=_Short
    )
    assert answer.choices[0].message.parsed in [_Short(sky=sky, wet=wet) for sky in ("clear", "grey") for wet in (0, 1)]


class _Short(BaseModel):
    sky: Literal["clear", "grey"]
    wet: bool


def test_sampled_answers_have_the_schema_and_their_seed(served):
    options = {"response_format": FORM, "temperature": 1.5, "top_p": 0.99}
    texts = [served.text("hello", MOST, seed=seed, **options) for seed in (1, 2, 3, 1)]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert texts[0] == texts[3]
    assert len({*texts}) > 1


def test_responses_take_it_as_the_format_of_their_text(served):
    form = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}}
    answer = served.client.responses.create(
        model=served.name, input="hello", text=form, max_output_tokens=MOST, temperature=0
    )
    jsonschema.validate(json.loads(answer.output_text), SCHEMA)


def test_a_json_object_begins_as_one(served):
    """Whether a random model ends it is another matter."""
    assert served.text("hello", 24, response_format={"type": "json_object"}).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ({"type": "yaml"}, "invalid_value", "response_format.type"),
        ("json", "invalid_value", "response_format"),
        ({"type": "json_schema"}, "missing_required_parameter", "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}, "invalid_json_schema", _SCHEMA),
    ],
)
def test_a_form_that_is_none_is_named(served, form, code, param):
    status, answer = served.asks(**HELLO, response_format=form)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param)
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_server_whose_queue_is_full_is_healthy_and_not_ready(served):
    assert served.raw("GET", "/ready") == (200, {"status": "ready"})
    with held() as (release, _):
        waiting = [post(served, "hello", max_tokens=4) for _ in range(4)]
        served.until(
            lambda found: found["river:num_requests_running",] + found["river:num_requests_waiting",] == len(waiting)
        )
        status, answer = served.raw("GET", "/ready")
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert served.raw("GET", "/health") == (200, {"status": "ok"})
        release.set()
        for connection in waiting:
            assert connection.getresponse().status == 200
            connection.close()
    served.until_free()
    assert served.raw("GET", "/ready")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_while_an_answer_is_written_is_openais(served, monkeypatch, stream):
    """A processor fails at the third token; the client's library raises its message."""

    def fail(self, input_ids, scores):
        if input_ids.shape[1] > self.length + 2:
            raise ValueError('it is "bad"')
        return scores

    monkeypatch.setattr("river_compile.cli.serving.requests.Penalties.__call__", fail)
    with pytest.raises(openai.APIError, match=r"it is .bad.") as raised:
        pieces(served.ask("hello", 8, presence_penalty=1, stream=stream))
    assert raised.value.body.keys() == {"message", "type", "param", "code"}
    monkeypatch.undo()
    assert served.text("hello")
