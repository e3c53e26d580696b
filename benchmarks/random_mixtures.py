"""Mixtures of experts with random weights: Qwen3-MoE in memory or as a GGUF file, gpt-oss as a checkpoint in MXFP4.

Their texts never end early and mean nothing. Not handled: tokenizers; the GGUF file has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
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


def write_gguf(shape: Shape, model: PreTrainedModel, target: Path) -> None:
    """Write a Qwen3-MoE as a GGUF file: matrices in BF16, norms and routers in F32, as llama.cpp converts them."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(target, "qwen3moe")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.chosen)
    writer.add_expert_feed_forward_length(shape.intermediate)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, shape.layers)
    for name, weight in _stacks_apart(model):
        own = names.get_name(name, try_suffixes=(".weight",))
        if weight.dim() == 1 or name.endswith("mlp.gate.weight"):
            writer.add_tensor(own, weight.float().numpy())
        else:
            data = weight.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(own, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stacks_apart(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights, a stack of gates and one of up projections where the model has them in one."""
    for name, weight in model.state_dict().items():
        layer, found, _ = name.partition("gate_up_proj")
        if found:
            gates, ups = weight.chunk(2, dim=1)
            yield f"{layer}gate_proj.weight", gates
            yield f"{layer}up_proj.weight", ups
        else:
            yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), weight
