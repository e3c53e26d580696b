"""A GGUF file that is converted gives the model of its weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tools.demo_models import convert
from tools.gguf_files import write_gguf


@pytest.fixture
def file(tmp_path):
    """A tiny Llama with random weights."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    write_gguf(AutoModelForCausalLM.from_config(config), tmp_path / "tiny.gguf", "F16")
    return tmp_path / "tiny.gguf"


def load(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def test_a_converted_model_has_the_weights_of_the_file_and_is_whole(file, tmp_path, monkeypatch):
    """Rounded to 16 bits from float32; buffers that are in no checkpoint come from the config."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: _NoTokenizer())
    (tmp_path / "made").mkdir()
    convert("a tiny Llama", file, tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    wanted = load(file).bfloat16()
    assert made.dtype == torch.bfloat16
    assert not hasattr(made.config, "quantization_config")
    assert all(torch.equal(made.state_dict()[name], weight) for name, weight in wanted.state_dict().items())
    assert torch.equal(made.model.rotary_emb.inv_freq, load(file).model.rotary_emb.inv_freq)


class _NoTokenizer:
    """Of the file, which has no vocabulary."""

    def save_pretrained(self, folder):
        """Writes nothing."""
