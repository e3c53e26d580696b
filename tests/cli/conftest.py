"""A tiny model in a folder, with a tokenizer of bytes, and graphs that run operator by operator."""

from __future__ import annotations

import pytest

from river_compile.config import RiverConfig
from tests.support.tokenizers import save_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a Llama with three blocks and random weights."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    """Commands compile with the backend's defaults; here these are the quick ones."""
    checked = RiverConfig.from_options.__func__
    quick = {"lowering": "eager", "group_size": 32}
    monkeypatch.setattr(RiverConfig, "from_options", classmethod(lambda cls, o: checked(cls, {**quick, **(o or {})})))
