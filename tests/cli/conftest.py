"""A tiny model in a folder, with a tokenizer of bytes, and graphs that run operator by operator."""

from __future__ import annotations

import pytest
import torch
import transformers

from river_compile.config import RiverConfig
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a Llama with three blocks and random weights."""
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    """Commands compile with the backend's defaults; here these are the quick ones."""
    checked = RiverConfig.from_options.__func__
    quick = {"lowering": "eager", "group_size": 32}
    monkeypatch.setattr(RiverConfig, "from_options", classmethod(lambda cls, o: checked(cls, {**quick, **(o or {})})))
