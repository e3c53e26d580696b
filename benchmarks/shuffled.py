"""A model with its channels in another order: the same function, of matrices without a past in 4 bits.

    python -m benchmarks.shuffled qwen-coder-1.5b DIR
    python -m benchmarks.twins --model DIR

The demo models were unpacked from files that hold runs of 32 weights of a row in 4 bits, and a twin whose groups are
such runs has little to lose. Here the features that a matrix reads are shuffled, so that no group of a twin is a run
of the file. Every group has weights of many of its grids, and the function stays the same, outliers included.

    features    of the hidden state    one order for the model: embedding, norms, head, all columns of what reads it
                of the MLP             one for each block: rows of gate and up, columns of down
                of an attention head   one for each head of keys: rows of its values, columns of the output projection

Sums come in another order, so that texts differ where roundings do.

Not handled (a ValueError): models that are not built like Llama's, such as those with experts, merged projections or
more norms.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import common
from tools import demo_models

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "dtype")
    parser.add_argument("model", help=f"{', '.join(demo_models.MODELS)} or a folder")
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="of the orders (%(default)s)")
    options = parser.parse_args(arguments)
    model, tokenizer = demo_models.load_or_exit(options.model, options.dtype)
    try:
        shuffle_channels(model, options.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"Written to {options.folder}")
    return 0


@torch.no_grad()
def shuffle_channels(model: PreTrainedModel, seed: int = 0) -> None:
    """Put a model's channels in a random order, in place.

    Raises:
        ValueError: it is not built like a Llama, and was not changed.
    """
    blocks = _blocks(model)
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden_size, generator=generator)
    body, head = model.base_model, model.get_output_embeddings()
    _reorder(body.embed_tokens.weight, columns=hidden)
    _reorder(body.norm.weight, rows=hidden)
    if head.weight is not body.embed_tokens.weight:
        _reorder(head.weight, columns=hidden)
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        inside = torch.randperm(mlp.down_proj.in_features, generator=generator)
        values, read = _head_orders(attention, config.num_attention_heads, config.num_key_value_heads, generator)
        for norm in _NORMS:
            _reorder(getattr(block, norm).weight, rows=hidden)
        for linear in (attention.q_proj, attention.k_proj):
            _reorder(linear.weight, columns=hidden)
        _reorder_linear(attention.v_proj, values, hidden)
        _reorder_linear(attention.o_proj, hidden, read)
        _reorder_linear(mlp.gate_proj, inside, hidden)
        _reorder_linear(mlp.up_proj, inside, hidden)
        _reorder_linear(mlp.down_proj, hidden, inside)


def _blocks(model: PreTrainedModel) -> Iterable[nn.Module]:
    """Return a model's blocks.

    Raises:
        ValueError: some have other parameters than Llama's.
    """
    known = {f"self_attn.{name}" for name in (*_ATTENTION, "q_norm", "k_norm")} | {f"mlp.{name}" for name in _MLP}
    known |= {*_NORMS}
    blocks = getattr(model.base_model, "layers", None)
    if blocks is None or not hasattr(model.base_model, "norm"):
        raise ValueError(f"{type(model).__name__} is not built like Llama, so its channels cannot be shuffled")
    for block in blocks:
        found = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        if not found <= known or not known - {"self_attn.q_norm", "self_attn.k_norm"} <= found:
            raise ValueError(
                f"{type(model).__name__} has blocks unlike Llama's ({', '.join(sorted(found ^ known))}), and such "
                "channels cannot be shuffled"
            )
    return blocks


def _head_orders(attention: nn.Module, heads: int, kv_heads: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the order of the values' rows, and that of the output projection's columns, which read them."""
    size = attention.v_proj.out_features // kv_heads
    orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(kv_heads)])
    values = orders + size * torch.arange(kv_heads)[:, None]
    read = orders.repeat_interleave(heads // kv_heads, dim=0) + size * torch.arange(heads)[:, None]
    return values.flatten(), read.flatten()


def _reorder_linear(linear: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    _reorder(linear.weight, rows, columns)
    if linear.bias is not None:
        _reorder(linear.bias, rows)


def _reorder(parameter: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    value = parameter if rows is None else parameter[rows]
    parameter.copy_(value if columns is None else value[:, columns])


if __name__ == "__main__":
    sys.exit(main())
