"""`river check` traces one layer of each kind: its counts are those of a trace of all layers, of any size of model."""

import pytest
import safetensors
import torch
import transformers

from river_compile.passes.program import Refusal
from river_compile.reporting import dry_run
from river_compile.upstream.transformers import merged_stacks
from tests.support.examples import slow_but
from tests.support.families import FAMILIES, make

SIZES = {
    "8b": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "70b": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "mixtral": transformers.MixtralConfig(),
    "qwen3-30b-a3b": transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    ),
    "gpt-oss-20b": transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
}  # fmt: skip
ACTIVE = {"8b": 7.0, "70b": 68.5, "mixtral": 12.6, "qwen3-30b-a3b": 2.7, "gpt-oss-20b": 3.0}  # 10^9 weights a token


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_of_each_kind_counts_for_all(family, monkeypatch):
    config = make(family, layers=7).config
    model = dry_run.empty_model(config, "bfloat16")
    found = dry_run.dry_run(model)
    assert model.config.get_text_config().num_hidden_layers == 7
    torch.compiler.reset()
    monkeypatch.setattr(dry_run, "layers_of", lambda model: Refusal("all are traced"))
    assert found == dry_run.dry_run(dry_run.empty_model(config, "bfloat16"))


@pytest.mark.parametrize("size", slow_but(["qwen3-30b-a3b"], SIZES))
def test_large_models_are_counted_by_the_weights_that_a_token_reads(size):
    config = SIZES[size]
    found = dry_run.dry_run(dry_run.empty_model(config, "bfloat16"))
    assert found["graphs"] == dict.fromkeys(("prefill", "decode"), config.num_hidden_layers)
    assert found["bytes"]["blocks"] / 2e9 == pytest.approx(ACTIVE[size], rel=0.05)
    assert 0.25 < found["bytes"]["twins"] / found["bytes"]["blocks"] < 0.35


@pytest.mark.parametrize("family", slow_but(["gpt_oss"], ["gpt_oss", "mistral", "gemma2", "llama4"]))
@pytest.mark.parametrize("window", [4, 8])
def test_windows_no_longer_than_the_traced_prompt_change_nothing(family, window):
    """River decodes on full caches, on which a window is a mask."""
    config = make(family, layers=2).config
    field = "attention_chunk_size" if family == "llama4" else "sliding_window"
    setattr(config, field, window)
    found = dry_run.dry_run(dry_run.empty_model(config, "bfloat16"))
    torch.compiler.reset()
    setattr(config, field, 64)
    assert found["graphs"] == {"prefill": 2, "decode": 2}
    assert found == dry_run.dry_run(dry_run.empty_model(config, "bfloat16"))


@pytest.mark.parametrize(
    ("family", "merged"), [("mixtral", True), ("qwen3_moe", True), ("deepseek_v3", True), ("gpt_oss", False)]
)
def test_stacks_that_loading_merges_are_those_that_no_file_has(family, merged, tmp_path):
    """A model that is saved and loaded maps its checkpoint's matrices, and owns the stacks that it made of several."""
    model = make(family, torch.bfloat16, layers=1)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    stacks = [(name, stack) for name, stack in loaded.named_parameters() if stack.dim() == 3]
    with safetensors.safe_open(file, "pt") as saved:
        made = [stack for name, stack in stacks if name not in saved.keys()]  # noqa: SIM118 (no mapping)
    assert [id(stack) for stack in merged_stacks(loaded)] == [id(stack) for stack in made]
    assert bool(made) == merged


def test_masks_that_count_slots_are_seen_without_a_trace():
    """One function says it here and in `generate`."""
    config = transformers.GPTNeoConfig(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    assert "masks count the slots" in dry_run.drafts_refusal(dry_run.empty_model(config, "bfloat16"))
    assert dry_run.drafts_refusal(make("llama")) == ""
