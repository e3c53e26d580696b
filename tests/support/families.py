"""Tiny randomly initialised causal language models of many families, for tests that need structure but no sense.

Every model has hidden size 64, a vocabulary of 128, and matrix dimensions divisible by 32, so that groups of 32
exist. Weights are drawn from a seed (`tools.families.tiny.draw_weights`). Sliding windows are 8 tokens long,
shorter than most prompts in the tests. Generation never ends early (no end-of-sequence token).

These models say nothing about quality or speed; `river_compile/cli/shared.py` has real ones for that.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tools.families.tiny import draw_weights

VOCABULARY = 128
HIDDEN = 64
SLIDING_WINDOW = 8

# Fields that most families spell alike. Four query heads share two KV heads.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _common(config_class: str, **fields) -> Callable[[int], PretrainedConfig]:
    """Returns a builder of configs that use the common field names; `fields` override or extend them."""
    return lambda layers: getattr(transformers, config_class)(**{**COMMON, "num_hidden_layers": layers, **fields})


def _alternating(config_class: str, **fields) -> Callable[[int], PretrainedConfig]:
    """Like `_common`, with every second block attending through a sliding window."""

    def build(layers: int) -> PretrainedConfig:
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
        return _common(config_class, layer_types=kinds, sliding_window=SLIDING_WINDOW, **fields)(layers)

    return build


def _gpt2(layers: int) -> PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_head=4, n_layer=layers, n_positions=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def _mpt(layers: int) -> PretrainedConfig:
    return transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, n_heads=4, n_layers=layers, max_seq_len=512, use_cache=True,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[int], PretrainedConfig]] = {
    "llama": _common("LlamaConfig", tie_word_embeddings=True),
    "mistral": _common("MistralConfig", sliding_window=SLIDING_WINDOW),
    "ministral": _alternating("MinistralConfig", head_dim=16),
    "ministral3": _common(  # rotary embedding stretched by YaRN
        "Ministral3Config",
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "qwen2": _common("Qwen2Config"),  # biases of q, k and v
    "qwen3": _common("Qwen3Config", head_dim=32, tie_word_embeddings=True),  # norms of q and k
    "phi": _common("PhiConfig"),  # attention parallel to the MLP, partial rotary embedding, biases everywhere
    "phi3": _common("Phi3Config"),  # q, k, v in one matrix; gate and up in one matrix
    "gemma2": _alternating("Gemma2Config", head_dim=32, query_pre_attn_scalar=32),  # four norms, capped logits
    "gemma3": _alternating("Gemma3TextConfig", head_dim=32, query_pre_attn_scalar=32),
    "smollm3": _common("SmolLM3Config", no_rope_layer_interval=2),  # every second block without rotary embedding
    "olmo2": _common("Olmo2Config"),  # norms after attention and MLP, none before
    "gpt2": _gpt2,  # transposed matrices, learned positions
    "gpt_neox": _common("GPTNeoXConfig", use_parallel_residual=True),
    "gpt_neox_serial": _common("GPTNeoXConfig", use_parallel_residual=False),
    "falcon": _common("FalconConfig", multi_query=True, parallel_attn=True, bias=False),
    "falcon_gqa": _common("FalconConfig", new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "granite": _common(
        "GraniteConfig",
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
        logits_scaling=2.0,
    ),
    "mixtral": _common("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _common("Qwen3MoeConfig", head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "opt": _common("OPTConfig", ffn_dim=128, word_embed_proj_dim=HIDDEN),
    "mpt": _mpt,  # ALiBi, norms without bias
}


# Families of which single tests want one: experts that are interleaved, transposed and biased, with sinks; experts
# shared by all tokens, with latent attention; and experts that each have their own rows.
MORE_CONFIGS: dict[str, Callable[[int], PretrainedConfig]] = {
    "gpt_oss": _alternating("GptOssConfig", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _common(
        "DeepseekV3Config", num_key_value_heads=4, moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16,
    ),
    "llama4": _common(
        "Llama4TextConfig", head_dim=16, num_local_experts=4, num_experts_per_tok=1, intermediate_size=64,
        intermediate_size_mlp=64,
    ),
}  # fmt: skip


def make(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 4,
    attention: str | None = None,
    experts: str | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Builds a model in eval mode; the same arguments give the same weights.

    Args:
        name: a key of `FAMILIES` or of `MORE_CONFIGS`.
        dtype: dtype of the weights, which are drawn in float32 and rounded.
        seed: of the weights.
        layers: number of decoder blocks.
        attention: transformers' attention implementation, ``"sdpa"`` or ``"eager"``; None takes the family's default.
        experts: transformers' implementation of experts, ``"grouped_mm"``, ``"batched_mm"`` or ``"eager"``.
        config: in place of the family's.
    """
    config = config or {**CONFIGS, **MORE_CONFIGS}[name](layers)
    chosen = {} if experts is None else {"experts_implementation": experts}
    with torch.random.fork_rng():  # (some families draw biases, to which the weights below are added)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention, **chosen)
    draw_weights(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: partial(make, name) for name in CONFIGS}

# With a static cache: MPT's code breaks the graph inside every block, so no piece of it holds a decoder.
REFUSED = {"mpt": "no decoder layers"}
REWRITTEN = [name for name in FAMILIES if name not in REFUSED]


# Blocks of each kind: plain, with four norms and windows, with attention parallel to the MLP, transposed, with experts.
QUICK = ("llama", "gemma3", "phi", "gpt2", "mixtral")


def each(parameters: Iterable[str | tuple], quick: Container[str] = QUICK) -> list:
    """Returns parameters of a test, which begin with the name of a family; all but those of `quick` are slow."""
    tuples = [(given,) if isinstance(given, str) else given for given in parameters]
    return [pytest.param(*given, marks=() if given[0] in quick else pytest.mark.slow) for given in tuples]


def prompt(length: int = 12, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Returns random token ids ``[batch, length]`` without the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
