"""Llamas with random weights, for measurements that only shapes and schedules matter to.

    python -m benchmarks.random_llama llama-3.2-1b DIR                 # a model folder and DIR/model.gguf beside it
    python -m benchmarks.decode --model DIR --gguf DIR/model.gguf --rows eager all_4bit llama_cpp

The GGUF file has the same shapes, in llama.cpp's Q4_1, which llama-cpp-python writes (benchmarks.peers). What a weight
means to llama.cpp (the order of rotated channels) is not kept, so its text is another.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import common, peers
from tools.kernels.shapes import MODELS, ModelShape

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__)
    parser.add_argument("shape", choices=[name for name in MODELS if "llama" in name or "smollm" in name])
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    options = parser.parse_args(arguments)
    model = random_llama(MODELS[options.shape])
    model.save_pretrained(options.folder)
    byte_tokenizer().save_pretrained(options.folder)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        wide = Path(scratch, "f16.gguf")
        write_gguf(model, wide)
        peers.convert("llama-cpp-python", wide, options.folder / "model.gguf", "Q4_1")
    return 0


def random_llama(shape: ModelShape, device: str = "cpu") -> PreTrainedModel:
    """Build a model on the device from its shape, with random bfloat16 weights, in eval mode; no text ends early."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def llama_config(shape: ModelShape) -> LlamaConfig:
    """Return the config of a Llama of a shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.name.startswith(("llama-3.2", "smollm2", "qwen2.5")),
        eos_token_id=None,
        pad_token_id=0,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, for models that know no words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write a Llama as a GGUF file without a vocabulary: matrices in float16, norms in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in model.named_parameters():
        writer.add_tensor(
            _gguf_name(name), weight.detach().to(torch.float32 if weight.ndim == 1 else torch.float16).numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    """Return what GGUF calls a parameter of a Llama."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in ends:
        return f"{ends[module]}.weight"
    _, _, block, inner = module.split(".", 3)
    return f"blk.{block}.{_GGUF_NAMES[inner]}.weight"


if __name__ == "__main__":
    sys.exit(main())
