"""A stretched model gives the logits of the model that it was made of, to the bit, with the weights of a larger one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from river_compile.kernels.quant.lossless import pack_8bit
from tools import demo_models, stretched
from tools.gguf_files import write_gguf

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IDS = torch.tensor([[5, 9, 1, 33, 60, 2, 2, 17]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen2 with random weights and biases in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def longer(folder, tmp_path_factory):
    """The same with 5 layers, in shards."""
    made = tmp_path_factory.mktemp("longer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretched, "SHARD_BYTES", 100_000)
        stretched.write_folder(folder, made, 5)
    return made


@torch.no_grad()
def logits(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **more})(IDS).logits


def test_the_logits_are_the_same_to_the_bit(folder, longer):
    assert torch.equal(logits(folder), logits(longer))
    assert len(list(longer.glob("*.safetensors"))) > 1
    assert (longer / "tokenizer.json").read_text() == "{}"


def test_no_two_layers_share_a_weight_and_none_compresses_better(longer):
    """River packs a weight once for all layers that have it, and takes some for numbers of 8 bits."""
    model = AutoModelForCausalLM.from_pretrained(longer, dtype="auto")
    assert (len(model.model.layers), model.config.num_hidden_layers, len(model.config.layer_types)) == (5, 5, 5)
    matrices = [p.detach() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
    contents = {matrix.view(torch.int16).numpy().tobytes() for matrix in matrices}
    assert len(contents) == len(matrices) == 5 * 7
    assert all(matrix.count_nonzero() > 0.99 * matrix.numel() for matrix in matrices)
    assert not any(pack_8bit([matrix]) for matrix in matrices)


def test_copies_stand_behind_their_layers():
    assert stretched.spread(2, 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert stretched.spread(3, 3) == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(ValueError, match="layers=2: the model has 3"):
        stretched.spread(3, 2)


def test_a_stretched_gguf_file_is_the_same_model(tmp_path):
    """Its added projections are zero: a float32 model has the same logits to the bit."""
    torch.manual_seed(0)
    write_gguf(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), tmp_path / "tiny.gguf", "F16")
    stretched.write_gguf(tmp_path / "tiny.gguf", tmp_path / "longer.gguf", 4)
    files = [{"gguf_file": f"{name}.gguf", "dtype": torch.float32} for name in ("tiny", "longer")]
    assert torch.equal(*(logits(tmp_path, **file) for file in files))
    layers = AutoModelForCausalLM.from_pretrained(tmp_path, **files[1]).model.layers
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in layers] == [True, False, True, False]
    assert all(layer.mlp.up_proj.weight.any() for layer in layers)


def test_a_model_with_other_names_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stretched, "_OUTPUTS", (".attention.wo.", ".mlp.down_proj."))
    with pytest.raises(ValueError, match=r"no \.attention\.wo\. or \.mlp\.down_proj\. in some layer"):
        stretched.write_folder(folder, tmp_path, 3)


def test_demo_models_are_stretched_once(folder, tmp_path, monkeypatch):
    source = demo_models.Source("longer", (), "longer.gguf", terms="none", stretched_from="tiny", layers=3)
    monkeypatch.setitem(demo_models.MODELS, "longer", source)
    monkeypatch.setitem(demo_models.MODELS, "tiny", demo_models.Source("tiny", (), "tiny.gguf", terms="none"))
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(folder)
    made = demo_models.fetch("longer")
    assert torch.equal(logits(folder), logits(made))
    time = (made / "config.json").stat().st_mtime_ns
    assert demo_models.fetch("longer") == made
    assert (made / "config.json").stat().st_mtime_ns == time
