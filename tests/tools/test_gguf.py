"""A GGUF file gives transformers the same model, whether it is read once or as often as transformers wants."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.gguf_files import write_gguf
from tools.demo_models import convert, reading_once


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
    write_gguf(AutoModelForCausalLM.from_config(config), tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def load(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def test_the_model_is_what_it_is_without(file):
    wanted = load(file).state_dict()
    with reading_once():
        found = load(file).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_each_file_is_read_once(file):
    with reading_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        assert gguf.GGUFReader(file).get_field("llama.block_count").contents() == 2


def test_others_read_as_before_once_it_has_ended(file):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(KeyError), reading_once():
        raise KeyError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


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
