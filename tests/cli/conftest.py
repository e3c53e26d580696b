"""A tiny model in a folder, with a tokenizer of bytes, a server of it, and graphs that run operator by operator."""

from __future__ import annotations

import contextlib

import pytest

from tests.support.commands import compile_by_operator
from tests.support.tokenizers import save_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a Llama with three blocks and random weights."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="package")
def served(tiny):
    """A server with three rows and one place to wait."""
    from tests.support.serving import QUEUE, ROWS, Served

    with contextlib.closing(Served(tiny, max_num_seqs=ROWS, queue=QUEUE)) as made:
        yield made


@pytest.fixture(scope="package")
def keyed(tiny):
    """A server with a key."""
    from tests.support.serving import Served

    with contextlib.closing(Served(tiny, api_key="secret")) as made:
        yield made


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    compile_by_operator(monkeypatch)


@pytest.fixture
def chain(served):
    """LangChain's chat model of the server."""
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    return langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model=served.name, temperature=0, max_tokens=400, max_retries=0
    )
