"""`river serve` as OpenAI's client sees it: streamed and whole texts, requests side by side, one that is left."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

import river_compile
from river_compile.cli import app, serve

openai = pytest.importorskip("openai", reason="the server's packages are not installed")
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="the server's packages are not installed")


@pytest.fixture(scope="module")
def served(tiny):
    """A client, and the model's name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve.accelerating(max_draft=1, adaptive=False, lowering="eager", group_size=32):
        server = serve.make_server(tiny, "127.0.0.1", port, "float32")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=20)
    yield client, tiny
    server.kill_server()


def plain(tiny, text, count):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(f"user: {text}\nassistant: ", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return whole(tokenizer.decode(out, skip_special_tokens=True))


def whole(text):
    """Returns a text without the half characters in its end, which a server may wait for."""
    return text.rstrip("\ufffd")


def ask(client, model, text, count=8, **options):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=count, temperature=0, **options
    )


def test_texts_are_the_plain_models_streamed_and_whole(served, tiny):
    client, name = served
    expected = plain(tiny, "hello", 8)
    with river_compile.trace() as trace:
        assert whole(ask(client, name, "hello").choices[0].message.content) == expected
    assert trace.cycles
    pieces = [c.choices[0].delta.content or "" for c in ask(client, name, "hello", stream=True) if c.choices]
    assert whole("".join(pieces)) == expected
    assert sum(map(bool, pieces)) > 1


@pytest.mark.slow
def test_requests_side_by_side_do_not_mix(served, tiny):
    client, name = served
    questions = [f"question {i}" for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda q: whole(ask(client, name, q).choices[0].message.content), questions))
    assert answers == [plain(tiny, question, 8) for question in questions]


def test_a_client_that_goes_away_ends_its_generation(served):
    """The next request is answered although the first one asked for far more tokens than it took."""
    client, name = served
    steps = []
    with river_compile.trace() as trace:
        stream = ask(client, name, "hello", count=1500, stream=True)
        next(iter(stream))
        stream.close()
        assert ask(client, name, "again", count=2).choices[0].message.content is not None
        steps = trace.steps
    assert len(steps) < 1000


def test_serve_says_where_it_listens(tiny, capsys, monkeypatch):
    class Ended:
        _thread = threading.Thread(target=lambda: None)

        def kill_server(self):
            self.killed = True

    Ended._thread.start()
    monkeypatch.setattr(serve, "make_server", lambda *arguments: Ended())
    assert app.main(["serve", tiny, "--port", "1234", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "http://localhost:1234/v1"
