"""A tiny model in a folder, with a tokenizer of bytes, and graphs that run operator by operator."""

from __future__ import annotations

import pytest

from tests.support.commands import compile_by_operator
from tests.support.tokenizers import save_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a Llama with three blocks and random weights."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    compile_by_operator(monkeypatch)
