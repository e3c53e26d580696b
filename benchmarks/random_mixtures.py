"""Mixtures of experts with random weights, whose texts never end early and mean nothing: Qwen3-MoE and gpt-oss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel, Qwen3MoeConfig

HEAD = 64  # features


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    experts: int
    chosen: int
    intermediate: int  # of an expert
    vocabulary: int

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 8)


QWEN = {
    "1.3b": Shape(12, 1024, 16, 64, 8, 512, 32000),
    "30b-a3b": Shape(8, 2048, 32, 128, 8, 768, 32000),  # eight of its 48 layers
    "tiny": Shape(2, 64, 4, 8, 2, 32, 128),
}
GPT_OSS = {
    "gpt-oss": Shape(4, 2880, 64, 32, 4, 2880, 8192),  # four of the 24 layers of gpt-oss-20b
    "gpt-oss-small": Shape(4, 1024, 16, 32, 4, 1024, 8192),
    "gpt-oss-tiny": Shape(2, 64, 2, 4, 4, 64, 8192),
}


def qwen(shape: Shape, sharpen: float = 1.0) -> PreTrainedModel:
    """Build a Qwen3-MoE in bfloat16, in eval mode; `sharpen` multiplies its head."""
    config = Qwen3MoeConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=HEAD, num_experts=shape.experts,
        num_experts_per_tok=shape.chosen, moe_intermediate_size=shape.intermediate, norm_topk_prob=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.lm_head.weight.data.mul_(sharpen)
    model.generation_config.eos_token_id = None
    return model


def gpt_oss(shape: Shape) -> GptOssConfig:
    """Return the configuration of a gpt-oss, for `tools.families.mxfp4.write_gpt_oss`."""
    return GptOssConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_local_experts=shape.experts, num_experts_per_tok=shape.chosen, vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=HEAD,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
