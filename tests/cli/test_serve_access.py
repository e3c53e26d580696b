"""Whom `river serve` answers and at which routes, and that no request stops the others: keys, pages, long bodies."""

import json
import socket
import threading
import time
from urllib.request import urlopen

import pytest
import transformers

import river_compile
from river_compile.cli import app

openai = pytest.importorskip("openai", reason="the server's packages are not installed")
for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server's packages are not installed")

from river_compile.cli.serving.connections import check_client  # noqa: E402
from tests.support.serving import CHAT, HELLO, WAIT, post  # noqa: E402

HELLO_JSON = json.dumps(HELLO)
SOON = 30  # seconds in which a server answers that nothing blocks
MOST = 2048 * 32 + 65536  # bytes of a body: 32 for each token of the context, and 64 KiB


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/reset"), ("POST", "/load_model"), ("POST", "/v1/audio/transcriptions"), ("POST", "/v1/systemone"),
        ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/v1/chat/completions/"), ("POST", "/v1/embeddings"),
    ],
)  # fmt: skip
def test_other_routes_are_404(served, method, path):
    status, answer = served.raw(method, path, "{}")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "unknown_url", None)
    assert path in answer["error"]["message"]
    assert served.text("hello", 1)


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("OPTIONS", "/v1/models"), ("OPTIONS", CHAT)])
def test_other_methods_are_405(served, method, path):
    """A browser's preflight is one, so no page of another site may send JSON or a key."""
    status, answer = served.raw(method, path, origin=served.url, access_control_request_method="POST")
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")


def test_models_are_listed_and_found(served):
    (listed,) = served.client.models.list().data
    assert served.client.models.retrieve(served.name) == listed
    assert listed.id == served.name
    with pytest.raises(openai.NotFoundError) as unknown:
        served.client.models.retrieve("other")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    status, answer = served.asks(**HELLO, model="other")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")


def test_responses_are_whole_unless_a_stream_is_asked_for(served):
    expected = served.text("hello")
    asked = {"model": served.name, "input": "hello", "max_output_tokens": 8, "temperature": 0}
    answer = served.client.responses.create(**asked)
    assert answer.output_text.rstrip("\ufffd") == expected
    assert (answer.status, answer.usage.output_tokens) == ("incomplete", 8)
    assert answer.incomplete_details.reason == "max_output_tokens"
    last = [*served.client.responses.create(**asked, stream=True)][-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text.rstrip("\ufffd") == expected


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", ""])
def test_pages_of_other_sites_are_refused(served, origin):
    before = served.metrics().get(("river:http_requests_total", CHAT, "403"), 0)
    status, answer = served.raw("POST", CHAT, HELLO_JSON, origin=origin)
    assert (status, answer["error"]["code"]) == (403, "forbidden_origin")
    assert served.metrics()["river:http_requests_total", CHAT, "403"] == before + 1
    assert served.raw("POST", CHAT, HELLO_JSON, origin=served.url)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("localhost.evil.example:80", 403), ("10.0.0.1", 403), ("[", 403), ("LOCALHOST:1", 200),
     ("a.localhost", 200), ("[::1]:80", 200), ("127.0.0.2", 200)],
)  # fmt: skip
def test_a_name_that_was_rebound_to_this_machine_is_refused(served, host, status):
    """Its page is of the same origin as the server, to a browser."""
    found, answer = served.raw("POST", CHAT, HELLO_JSON, host=host, origin=f"http://{host}")
    assert found == status
    assert status == 200 or answer["error"]["code"] == "forbidden_host"


def test_a_body_of_another_type_is_415(served):
    """Pages of other sites may send text without a preflight."""
    status, answer = served.raw("POST", CHAT, HELLO_JSON, content_type="text/plain")
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    assert served.raw("POST", CHAT, HELLO_JSON, content_type="Application/JSON; charset=utf-8")[0] == 200


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secre\u00e9"])
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("POST", "/reset")])
def test_without_the_key_nothing_is_answered(keyed, key, method, path):
    given = {} if key is None else {"authorization": key}
    status, answer = keyed.raw(method, path, HELLO_JSON, **given)
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_with_the_key_all_is_answered(keyed):
    """Under any name, since a page of a name that was rebound has no key; probes need none."""
    assert keyed.client.with_options(api_key="secret").models.list().data[0].id == keyed.name
    given = {"authorization": "bearer secret", "host": "inside.example"}
    assert keyed.raw("POST", CHAT, HELLO_JSON, **given)[0] == 200
    assert keyed.raw("POST", CHAT, HELLO_JSON, **given, origin="http://evil.example")[0] == 403
    assert keyed.raw("GET", "/health") == (200, {"status": "ok"})
    with pytest.raises(openai.AuthenticationError):
        keyed.ask("hello")


@pytest.mark.parametrize("key", ["", "two words", "\u00e9"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_key_that_no_client_can_send_is_named(tiny, capsys, monkeypatch, key, by):
    if by == "variable":
        monkeypatch.setenv("RIVER_COMPILE_API_KEY", key or " ")
    assert app.main(["serve", tiny, *(["--api-key", key] if by == "argument" else [])]) == 1
    assert "--api-key is empty, or has " in capsys.readouterr().err


def begin(served, *lines):
    """Sends the beginning of a request; returns its socket."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=SOON)
    head = [f"POST {CHAT} HTTP/1.1", f"Host: 127.0.0.1:{served.port}", "Content-Type: application/json", *lines]
    connection.sendall("\r\n".join([*head, "", ""]).encode())
    return connection


def test_a_body_beyond_the_context_is_413_before_it_is_sent(served):
    with begin(served, f"Content-Length: {MOST + 1}") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    status, answer = served.raw("POST", CHAT, b" " * (MOST + 1))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert served.raw("POST", CHAT, HELLO_JSON.ljust(MOST))[0] == 200


def test_a_body_in_chunks_is_413_at_the_limit(served):
    """It has not ended, and may never."""
    with begin(served, "Transfer-Encoding: chunked") as connection:
        connection.sendall(b"%x\r\n%b\r\n" % (MOST + 1, b" " * (MOST + 1)))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.fixture
def templating(monkeypatch):
    """A function that runs in a chat template's place, before the template does."""
    theirs, instead = transformers.PreTrainedTokenizerBase.apply_chat_template, []

    def template(*args, **kwargs):
        for call in instead:
            call()
        return theirs(*args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "apply_chat_template", template)
    return instead.append


def test_others_are_answered_while_a_text_becomes_tokens(served, templating):
    begun, release = threading.Event(), threading.Event()
    templating(lambda: begun.set() or release.wait(WAIT))
    connection = post(served, "hello", max_tokens=2)
    try:
        assert begun.wait(WAIT)
        with urlopen(f"{served.url}/health", timeout=SOON) as answer:
            assert json.load(answer) == {"status": "ok"}
        completion = served.client.completions.create(model=served.name, prompt="hello", max_tokens=2, timeout=SOON)
        assert completion.usage.completion_tokens == 2
    finally:
        release.set()
    assert connection.getresponse().status == 200


def test_requests_whose_text_becomes_tokens_have_places(served, templating):
    """As many as may run and wait; the next is asked to retry."""
    release = threading.Event()
    begun = threading.Semaphore(0)
    templating(lambda: begun.release() or release.wait(WAIT))
    places = served.server.state.manager.limit + served.server.state.manager.queue
    connections = [post(served, "hello", max_tokens=2) for _ in range(places)]
    try:
        for _ in range(places):
            assert begun.acquire(timeout=WAIT)
        with pytest.raises(openai.RateLimitError):
            served.client.completions.create(model=served.name, prompt="hello", max_tokens=2)
    finally:
        release.set()
    assert [connection.getresponse().status for connection in connections] == [200] * places


def test_a_client_that_hangs_up_ends_its_texts_tokens(served, templating):
    """The thread sees that it has gone, and neither tokenizes nor generates."""
    begun = threading.Event()
    end = time.monotonic() + WAIT

    def until_gone():
        begun.set()
        while time.monotonic() < end:
            check_client()
            time.sleep(0.01)

    templating(until_gone)
    gone = ("river:http_requests_total", CHAT, "499")
    before = served.metrics()
    with river_compile.trace() as trace:
        connection = post(served, "hello")
        assert begun.wait(WAIT)
        connection.close()
        served.until(lambda found: found.get(gone, 0) == before.get(gone, 0) + 1)
        assert not trace.steps
    assert served.metrics()["river:finished_requests_total",] == before["river:finished_requests_total",]


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_long_text_becomes_tokens_up_to_the_context(served, monkeypatch, path):
    """It is refused at its first piece."""
    lengths, theirs = [], transformers.PreTrainedTokenizerFast._encode_plus

    def encode(self, text, *args, **kwargs):
        lengths.append(len(text))
        return theirs(self, text, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "_encode_plus", encode)
    text = "x" * (MOST - 1000)
    field = {"prompt": text} if path == "completions" else {"messages": [{"role": "user", "content": text}]}
    status, answer = served.asks(path, **field)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == next(iter(field))
    assert lengths == [1 << 16]
