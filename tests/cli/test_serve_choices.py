"""Choices, log-probabilities and ends of texts of `river serve`, by the clients of OpenAI and LangChain."""

import json
import math
from urllib.request import Request, urlopen

import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

openai = pytest.importorskip("openai", reason="the server's packages are not installed")
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

# What follows needs those packages.
from langchain_core.messages import HumanMessage  # noqa: E402

from tests.support.serving import HELLO, JSON, pieces, whole  # noqa: E402

SAMPLED = {"temperature": 0.9, "top_p": 0.95}


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
def test_a_text_that_ends_at_its_last_token_is_whole(served, stream):
    options = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [7]}}}}
    for most, reason in ((1, "length"), (2, "stop")):
        answer = served.ask("hello", most, stream=stream, **options)
        last = [*answer][-1] if stream else answer
        assert last.choices[0].finish_reason == reason


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
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named(served, path, field, code, param):
    body = {"completions": {"prompt": "hello"}, "responses": {"input": "hello"}}.get(path, HELLO)
    status, answer = served.asks(path, **body, **field)
    error = answer["error"]
    assert (status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error"), answer
    assert param in error["message"]


def test_langchain_answers_and_streams(served, chain):
    short = chain.bind(max_tokens=8)
    answer = short.invoke("hello")
    assert whole(answer.content) == served.text("hello")
    assert answer.usage_metadata["output_tokens"] == 8
    parts = [*short.stream("hello")]
    assert whole("".join(part.content for part in parts)) == served.text("hello")


def test_langchain_gets_log_probabilities(chain):
    answer = chain.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke("hello")
    assert [len(entry["top_logprobs"]) for entry in answer.response_metadata["logprobs"]["content"]] == [2, 2, 2]


def test_langchain_gets_several_choices(served, chain):
    made = chain.generate([[HumanMessage("dice")]], n=2, seed=3, max_tokens=6, **SAMPLED)
    assert [whole(g.text) for g in made.generations[0]] == [
        served.text("dice", 6, seed=seed, **SAMPLED) for seed in (3, 4)
    ]
