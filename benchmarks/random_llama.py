"""Llamas with random weights, for measurements that only shapes and schedules matter to.

python -m benchmarks.random_llama llama-3.2-1b DIR     # a model folder, with bytes as its tokens
python -m benchmarks.decode --model DIR --rows eager all_4bit
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import common
from tools.kernels.shapes import MODELS, ModelShape


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "device")
    parser.add_argument("shape", choices=[name for name in MODELS if "llama" in name or "smollm" in name])
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    options = parser.parse_args(arguments)
    random_llama(MODELS[options.shape], options.device).save_pretrained(options.folder)
    byte_tokenizer().save_pretrained(options.folder)
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


if __name__ == "__main__":
    sys.exit(main())
