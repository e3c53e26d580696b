"""Tiny random models of any family: the config class's defaults with every known size made small.

Hidden size 64, a vocabulary of 128, three blocks, windows of eight tokens, four experts of which two are chosen; inputs
of matrices are divisible by 32, so that groups of 32 exist. Where a list has an entry for each block, every kind that
the defaults hold occurs. `OVERRIDES` has what single families need besides.

Not handled: sense. These models say nothing about quality or speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

VOCABULARY = 128
LAYERS = 3
MATRIX_GAIN = 1.6  # above one, so that blocks outweigh the embedding and attention prefers some tokens

_SPELLINGS = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size shape_vocab_size "
     "pronunciation_vocab_size"),
    (64, "hidden_size n_embd d_model dim_model embedding_size word_embed_proj_dim input_embedding_size emb_dim "
     "output_embedding_size attention_hidden_size lru_width backbone_hidden_size pronunciation_embed_dim "
     "shape_embed_dim moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
     "moe_shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    (128, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner dff dim_ff d_inner "
     "intermediate_size_mlp dense_intermediate_size feed_forward_size mamba_d_ssm"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
     "num_encoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
     "num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts num_local_experts "
     "moe_num_experts index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads "
     "swa_num_attention_heads zero_expert_num"),
    (16, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim rotary_dim swa_head_dim kv_channels "
     "dim_head attention_head_size linear_key_head_dim linear_value_head_dim linear_head_dim d_rel rel_extent "
     "laurel_rank loop_gate_rank mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank "
     "gated_norm_rank global_head_dim swa_v_head_dim mamba_d_head mamba_head_dim"),
    (32, "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input hc_lowrank"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts "
     "n_group num_expert_group swa_num_key_value_heads num_kv_shared_layers o_groups"),
    (1, "topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers moe_layer_start_index "
     "mamba_n_groups n_groups"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (8, "sliding_window sliding_window_size window_size attention_window_size local_attention attention_chunk_size "
     "index_topk mamba_n_heads mamba_num_heads chunk_size mamba_chunk_size"),
)  # fmt: skip
_SIZES = {name: value for value, names in _SPELLINGS for name in names.split()}

_HYBRID = ["linear_attention", "full_attention", "linear_attention"]

OVERRIDES: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
        "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "head_dim": 32,
    },
    "falcon": {"multi_query": True},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {  # the last two blocks read the cache of the first two
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4_text": {
        "global_head_dim": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 32, "num_heads": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128, "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of a family in float32 and eval mode, whose generation never ends early.

    Equal seeds give equal weights.

    Raises:
        Exception: whatever transformers raises where such a model cannot be built.
    """
    config = tiny_config(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_config(config_class: type[PretrainedConfig], overrides: Mapping[str, object]) -> PretrainedConfig:
    """Return a small config; `overrides` name its fields, or with a dict those of a config inside it."""
    default = config_class()
    names = {field.name for field in dataclasses.fields(config_class)}
    small = {name: _small(default, name) for name in names}
    small = {name: value for name, value in small.items() if value is not None}
    for name in config_class.sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            small[name] = tiny_config(type(inner), overrides.get(name, OVERRIDES.get(inner.model_type, {})))
    fixed = {name: value for name, value in overrides.items() if name not in config_class.sub_configs}
    # A decoder that keeps a cache, also where the family also has encoders.
    role = {"is_decoder": True, "use_cache": True} if {"is_decoder", "use_cache"} & names else {}
    config = config_class(**{**small, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **role, **fixed})
    return config


def _small(default: PretrainedConfig, name: str) -> object:
    """Return the tiny value of a field, None where the default may stay."""
    value = default._getattr_without_heterogeneous_validation(name, None)
    if isinstance(value, (list, tuple)):
        return _for_each_block(default, list(value))
    if value is None:
        return _SIZES[name] if name in ("head_dim", "num_key_value_heads") else None
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return None
    if name.endswith(("_token_id", "_token_index")):
        return VOCABULARY - 1 if value >= VOCABULARY else None
    if name == "num_key_value_heads" and default._hasattr_without_heterogeneous_validation("kv_lora_rank"):
        return _SIZES["num_attention_heads"]  # (latent attention has as many as query heads)
    return _SIZES.get(name)


def _for_each_block(default: PretrainedConfig, values: list) -> list | None:
    """Return a list with an entry for each of the few blocks, in which every kind of entry occurs."""
    blocks = getattr(default, "num_hidden_layers", None)
    if not values or len(values) != blocks:
        return None
    kinds = [value for i, value in enumerate(values) if value not in values[:i]]
    return [kinds[i % len(kinds)] for i in range(LAYERS)]


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw the weights: matrices about keep the scale of their input, biases are not zero, norms' weights not one.

    So a bias that is lost, or a norm that is forgotten, changes the logits.

    What is neither a vector nor the matrix of a linear layer, an embedding, a router or experts stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [(type(m), id(m.weight)) for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    embeddings = {weight for kind, weight in kinds if issubclass(kind, nn.Embedding)}
    transposed = {weight for kind, weight in kinds if issubclass(kind, Conv1D)}
    matrices = {w for kind, w in kinds if issubclass(kind, nn.Linear) or kind.__module__.startswith("transformers.")}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:  # biases start at zero, norm weights at one (or at zero, meaning one)
            parameter.add_(noise, alpha=0.2)
        elif id(parameter) in embeddings:
            parameter.copy_(noise * 0.1)
        elif id(parameter) in matrices or parameter.dim() == 3:
            fan_in = parameter.shape[0 if id(parameter) in transposed else -1]
            parameter.copy_(noise * MATRIX_GAIN * fan_in**-0.5)
