"""`river serve` as its clients see it: texts side by side, limits, clients that leave, metrics.

A step that is held blocks its caller, so that what happens meanwhile does not depend on time.
"""

import itertools
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import river_compile
from river_compile.cli import app, serve
from tests.support.decoding import rows_of_steps

openai = pytest.importorskip("openai", reason="the server's packages are not installed")
for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the server's packages are not installed")

from river_compile.cli.serving.errors import Refused  # noqa: E402
from river_compile.cli.serving.streams import Stops  # noqa: E402
from tests.support.serving import CHAT, HELLO, ROWS, WAIT, Served, held, pieces, post, whole  # noqa: E402

CONTEXT, LONG = 2048, 1500  # the tiny model's; tokens that take far longer than any other request here
SAMPLED = {"temperature": 0.9, "top_p": 0.95}


@pytest.fixture(scope="module")
def plain(tiny):
    """A function that returns the plain model's text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)

    def text(question, count=8, seed=None, **sampled):
        if seed is not None:
            torch.manual_seed(seed)
        ids = tokenizer(f"user: {question}\nassistant: ", return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=count, do_sample=seed is not None, **sampled)[0, ids.shape[1] :]
        return whole(tokenizer.decode(out, skip_special_tokens=True))

    return text


def test_texts_are_the_plain_models_streamed_and_whole(served, plain):
    expected = plain("hello")
    with river_compile.trace() as trace:
        assert served.text("hello") == expected
    assert trace.cycles
    found = pieces(served.ask("hello", stream=True))
    assert whole("".join(found)) == expected
    assert sum(map(bool, found)) > 1


@pytest.mark.parametrize("sampled", [False, True])
def test_four_clients_at_once_get_the_texts_that_each_gets_alone(served, plain, sampled):
    """Two are streamed; the first step ends when all of them are there, and as many as there are rows run together."""
    questions = [("question", 9), ("another question, a longer one", 5), ("why", 12), ("hm", 7)]
    settings = [{"seed": seed, **SAMPLED} if sampled else {} for seed in range(4)]
    expected = [plain(question, count, **more) for (question, count), more in zip(questions, settings, strict=True)]
    with rows_of_steps() as seen, held() as (release, _), ThreadPoolExecutor(2) as pool:
        streams = [served.ask(*questions[i], stream=True, **settings[i]) for i in (0, 1)]
        texts = [pool.submit(served.text, *questions[i], **settings[i]) for i in (2, 3)]
        served.until(lambda found: found["river:num_requests_running",] + found["river:num_requests_waiting",] == 4)
        release.set()
        found = [whole("".join(pieces(stream))) for stream in streams] + [text.result() for text in texts]
    assert found == expected
    assert max(seen) == ROWS


def test_a_seed_is_its_clients_alone(served, plain):
    """The same question with the same seed has the same text, whatever requests come between."""
    first = served.text("dice", seed=3, **SAMPLED)
    assert first == plain("dice", seed=3, **SAMPLED)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(served.text, "dice", seed=seed, **SAMPLED) for seed in (4, 3, 5)]
        assert others[1].result() == first
        assert others[0].result() != first


def test_stop_strings_and_lengths_are_each_clients_own(served, plain):
    text = plain("hello", 12)
    stop = next(character for character in text[2:] if character.isascii())
    with ThreadPoolExecutor(2) as pool:
        stopped = pool.submit(served.ask, "hello", 12, stop=[stop])
        other = pool.submit(served.ask, "hello", 12)
        assert whole(other.result().choices[0].message.content) == text
        assert other.result().choices[0].finish_reason == "length"
        assert stopped.result().choices[0].message.content == text[: text.index(stop)]  # as OpenAI's
        assert stopped.result().choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_of_several_tokens_is_left_out(served, plain, stream):
    text = plain("hello", 12)
    at = next(i for i in range(1, 10) if text[i : i + 3].isascii())
    stop = text[at : at + 3]
    answer = served.ask("hello", 12, stop=stop, stream=stream)
    found = "".join(pieces(answer)) if stream else answer.choices[0].message.content
    assert found == text[: text.index(stop)]


def test_values_that_ask_for_nothing_are_taken(served, plain):
    nothing = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "auto", "user": "me"}
    status, answer = served.asks(**HELLO, **nothing, presence_penalty=0, stop=None, top_logprobs=None)
    assert status == 200, answer
    assert whole(answer["choices"][0]["message"]["content"]) == plain("hello", 2)


def test_a_bias_in_integers(served):
    """A token with a bias of 100 is every token of the text."""
    assert served.text("hello", 4, logit_bias={"70": 100}) == served.text("hello", 1, logit_bias={"70": 100}) * 4


@pytest.mark.parametrize(("presence", "frequency"), [(2, 0), (0, 2), (-1, -0.5)])
def test_penalties_are_openais(served, plain, presence, frequency):
    """A token that was generated n times loses presence + n * frequency."""

    def penalised(ids, scores):
        seen = list(ids[0, len("user: aaaa\nassistant: ") :])
        for token in {*map(int, seen)}:
            scores[0, token] -= presence + seen.count(token) * frequency
        return scores

    expected = plain("aaaa", 16, logits_processor=transformers.LogitsProcessorList([penalised]))
    found = served.text("aaaa", 16, presence_penalty=presence, frequency_penalty=frequency)
    assert found == expected != plain("aaaa", 16)


@given(st.text("ab ", max_size=30), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stops_cut_at_the_first_whatever_the_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    found = Stops(stops)
    shown = [found.feed(text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole_text = "".join(shown) + found.rest()
    assert whole_text == text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
    assert Stops(stops).cut(text) == whole_text


def test_a_client_that_leaves_its_stream_frees_its_row(served):
    with river_compile.trace() as trace:
        stream = served.ask("hello", LONG, stream=True)
        next(iter(stream))
        stream.close()
        served.until_free()
        steps = trace.steps
    assert len(steps) < LONG / 2


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_frees_its_row(served, streamed):
    """A socket is closed while the answer is still being made; it counts as 499."""
    gone = ("river:http_requests_total", CHAT, "499")
    before = served.metrics().get(gone, 0)
    with river_compile.trace() as trace:
        with held() as (_, begun):
            connection = post(served, "hello", max_tokens=LONG, stream=streamed)
            assert begun.wait(WAIT)
            connection.close()
        served.until(lambda found: found.get(gone, 0) == before + 1)
        served.until_free()
        steps = trace.steps
    assert len(steps) < LONG / 2


def test_a_full_queue_is_429_and_places_come_back(served, plain):
    """All rows generate, one client waits, the next is asked to retry; a client that hung up gives its place."""
    with held() as (release, _):
        streams = [served.ask(f"row {i}", 4, stream=True) for i in range(ROWS)]
        left = post(served, "left", max_tokens=4)
        served.until(
            lambda found: found["river:num_requests_running",] + found["river:num_requests_waiting",] == ROWS + 1
        )
        with pytest.raises(openai.RateLimitError, match=f"{ROWS} requests are running and 1 ") as refused:
            served.ask("too many")
        assert refused.value.code == "queue_full"
        assert refused.value.response.headers["retry-after"] == "1"
        gone = served.metrics().get(("river:http_requests_total", CHAT, "499"), 0)
        left.close()
        served.until(lambda found: found.get(("river:http_requests_total", CHAT, "499"), 0) == gone + 1)
        streams.append(served.ask("row 3", 4, stream=True))
        release.set()
        assert [whole("".join(pieces(s))) for s in streams] == [plain(f"row {i}", 4) for i in range(ROWS + 1)]
    assert served.metrics()["river:http_requests_total", CHAT, "429"] == 1


def test_an_answer_that_has_ended_holds_no_place(served, monkeypatch):
    """Its client may ask again before the call that wrote it has returned."""
    manager = served.server.state.manager
    calls = SimpleNamespace(alive=True, submit=lambda *_: Future(), cancel=lambda call: None)
    monkeypatch.setattr(manager, "batch", calls)
    monkeypatch.setattr(manager, "_calls", [])
    streamers = [SimpleNamespace(ended=False) for _ in range(manager.limit + manager.queue)]
    for streamer in streamers:
        manager.submit(lambda streamer: None, streamer=streamer)
    with pytest.raises(Refused, match="requests are running"):
        manager.submit(lambda: None)
    streamers[0].ended = True
    manager.submit(lambda: None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_models_context_is_its_clients_error(served, plain, stream):
    with held() as (release, _):
        other = served.ask("hello", stream=True)
        with pytest.raises(openai.BadRequestError, match=r"context length is 2048 .* your prompt has 3018") as bad:
            served.ask("x" * 3000, stream=stream)
        release.set()
        assert whole("".join(pieces(other))) == plain("hello")
    assert bad.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_a_text_ends_where_the_models_context_does(served):
    answer = served.ask("x" * (CONTEXT - 22), 50)
    assert answer.usage.completion_tokens == CONTEXT - answer.usage.prompt_tokens == 4
    assert answer.choices[0].finish_reason == "length"


def test_metrics_count_what_was_asked_of_one_server(served, keyed):
    """Another server of the process has its own metrics."""
    before, others = served.metrics(), keyed.metrics()
    served.ask("hello", 5)
    pieces(served.ask("hello", 6, stream=True))
    served.until_free()
    after = served.metrics()

    def more(*name):
        return after[name] - before.get(name, 0)

    assert more("river:generation_tokens_total") == 11
    assert more("river:finished_requests_total") == 2
    assert more("river:http_requests_total", CHAT, "200") == 2
    assert more("river:time_to_first_token_seconds_count") == 2
    assert more("river:time_to_first_token_seconds_sum") > 0
    assert 0 <= more("river:spec_decode_num_accepted_tokens_total") <= more("river:spec_decode_num_draft_tokens_total")
    assert more("river:busy_seconds_total") > 0
    assert after["river:max_num_seqs",] == ROWS
    assert keyed.metrics()["river:generation_tokens_total",] == others["river:generation_tokens_total",]


def test_health_is_503_where_the_thread_that_generates_has_ended(tiny, caplog):
    dying = Served(tiny)
    try:
        with urlopen(f"{dying.url}/health") as answer:
            assert json.load(answer) == {"status": "ok"}
        model = dying.server.state.manager.model
        assert river_compile.report(model).decode_depths  # it has generated before it listened
        dying.server.state.manager.batch.close()
        with pytest.raises(OSError, match="503"):
            urlopen(f"{dying.url}/health")
        assert "the generating thread has ended" in caplog.text
        with pytest.raises(openai.InternalServerError, match="the generating thread has ended") as refused:
            dying.ask("hello")
        assert refused.value.status_code == 503
    finally:
        dying.close()


def test_serve_says_where_it_listens(tiny, capsys, monkeypatch):
    class Ended:
        started, kv_bytes_per_token, context = True, 1536, 2048

        def wait(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr(serve, "make_server", lambda *arguments, **more: Ended())
    monkeypatch.setattr(serve, "_check_address", lambda *address: None)
    monkeypatch.setattr(serve.signal, "signal", lambda *handler: None)
    assert app.main(["serve", tiny, "--port", "1234", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "http://localhost:1234/v1"
    assert app.main(["serve", tiny, "--port", "1234"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "KV cache: 1.5 kB a token of each of 8 clients, 3.1 MB at the context of 2,048 tokens" in page


def test_a_port_in_use_is_named_before_the_model_is_loaded(capsys):
    with socket.create_server(("localhost", 0)) as other:
        port = str(other.getsockname()[1])
        assert app.main(["serve", "/no/such/model", "--port", port]) == 1
        assert f"--host localhost --port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_lets_a_running_answer_end(tiny):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "river_compile", "serve", tiny, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert any("running on" in line for line in process.stdout)  # it has built, and generated
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        stream = client.chat.completions.create(
            model=tiny, messages=[{"role": "user", "content": "hello"}], max_tokens=200, stream=True
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = [*stream]
        said = process.stdout.read()
    assert first.choices
    assert rest[-1].choices[0].finish_reason == "length", said
    assert process.returncode == 0, said


@pytest.mark.parametrize("bad", [("--max-num-seqs", "0"), ("--queue", "-1")])
def test_bad_limits_are_named(tiny, capsys, bad):
    assert app.main(["serve", tiny, *bad]) == 1
    assert " ".join(bad) in capsys.readouterr().err
