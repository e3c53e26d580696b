"""A server in the tests' process, and its clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from urllib.request import urlopen

import openai
from prometheus_client.parser import text_string_to_metric_families

from river_compile.cli import serve
from river_compile.runtime.state import on_step

JSON = "application/json"
CHAT = "/v1/chat/completions"
WAIT = 600  # seconds, for what a busy machine compiles first; no test waits so long where nothing is wrong
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
ROWS, QUEUE = 3, 1  # of the server that the tests share


class Served:
    """A server in this process, and a client."""

    def __init__(self, folder, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {
            "num_assistant_tokens": 1,
            "num_assistant_tokens_schedule": "constant",
            "kernels": "auto",
            "group_size": 32,
        }
        self.server = serve.make_server(folder, "127.0.0.1", self.port, "float32", **more, **options)
        self.url, self.name = f"http://127.0.0.1:{self.port}", folder
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=WAIT, max_retries=0)
        while not self.server.started:
            self.server.wait(0.01)

    def ask(self, text, count=8, **options):
        options = {"temperature": 0, **options}
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=self.name, messages=messages, max_tokens=count, **options)

    def text(self, text, count=8, **options):
        return whole(self.ask(text, count, **options).choices[0].message.content)

    def metrics(self):
        with urlopen(f"{self.url}/metrics") as page:
            families = text_string_to_metric_families(page.read().decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def until(self, true):
        """Asks for metrics until they are as wanted."""
        end = time.monotonic() + WAIT
        while not true(self.metrics()):
            assert time.monotonic() < end

    def until_free(self):
        """Waits until no row generates."""
        self.until(lambda found: found["river:num_requests_running",] == found["river:num_requests_waiting",] == 0)

    def raw(self, method, path, body=None, **headers):
        """Sends a request as it is, with JSON's type of content by default; returns the status and the answer."""
        headers = {name.replace("_", "-"): value for name, value in {"content_type": JSON, **headers}.items()}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            said = response.read()
        return response.status, json.loads(said) if said else None

    def asks(self, path="chat/completions", **body):
        """Sends a body as JSON; returns the status and the answer."""
        return self.raw("POST", f"/v1/{path}", json.dumps(body))

    def close(self):
        self.server.close()


def pieces(stream):
    return [c.choices[0].delta.content or "" for c in stream if c.choices]


def whole(text):
    """Returns a text without the half characters in its end, which a server may wait for."""
    return text.rstrip("\ufffd")


@contextlib.contextmanager
def held():
    """Steps wait inside: yields an event that lets them continue, and one that says that the first step is there."""
    release, begun = threading.Event(), threading.Event()

    def step(*_):
        begun.set()
        release.wait(WAIT)

    with on_step(step):
        try:
            yield release, begun
        finally:
            release.set()


def post(served, text, **settings):
    """Sends a request and does not wait for its answer; returns the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **settings}
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": JSON})
    return connection
