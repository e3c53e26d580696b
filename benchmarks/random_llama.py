"""Llamas with random weights, for measurements that only shapes and schedules matter to."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from river_compile.kernels.tools.shapes import ModelShape


def random_llama(shape: ModelShape, device: str = "cpu") -> PreTrainedModel:
    """Builds a model on the device from its shape, with random bfloat16 weights, in eval mode; no text ends early."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.name == "llama-3.2-1b",
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model
