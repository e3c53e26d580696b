"""Writes GGUF files of models with random weights, for llama.cpp and for tests of what reads them.

Not handled: vocabularies, other families than Llama and Qwen3-MoE, and Llama's order of rotated features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel


def write_gguf(model: PreTrainedModel, path: Path, matrices: str) -> None:
    """Write a GGUF file: matrices in "F16" or "BF16", norms and routers in float32, as llama.cpp converts them."""
    import gguf

    config = model.config
    family = config.model_type.replace("_", "")
    writer = gguf.GGUFWriter(path, family)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("no_vocab")
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[matrices]
    dtype = torch.float16 if matrices == "F16" else torch.bfloat16
    for name, weight in _stacks_apart(model):
        own = names.get_name(name, try_suffixes=(".weight",))
        if weight.dim() == 1 or name.endswith("mlp.gate.weight"):
            writer.add_tensor(own, weight.float().numpy())
        else:  # (numpy has no bfloat16)
            writer.add_tensor(own, weight.to(dtype).contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stacks_apart(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights, a stack of gates and one of up projections where the model has them in one."""
    for name, parameter in model.named_parameters():
        weight, (layer, found, _) = parameter.detach(), name.partition("gate_up_proj")
        if found:
            gates, ups = weight.chunk(2, dim=1)
            yield f"{layer}gate_proj.weight", gates
            yield f"{layer}up_proj.weight", ups
        else:
            yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), weight
