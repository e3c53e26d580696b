"""What the fills compute, written out: a Llama model's modules, token by token and block by block, keys in dicts.

Nothing here knows of graphs, caches or masks: attention reads the entries that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class Reference:
    """One sequence decoded with given exit depths.

    Args:
        model: of the family "llama".
        fill: "propagate", "recompute", "mask" or "monotone".

    Attributes:
        entries: of each block, {token: (key, value)}, each ``[kv heads, head dim]``.
        logits: of each token, ``[V]``.
        depths: blocks that each token executed before it left.
    """

    def __init__(self, model: LlamaForCausalLM, fill: str) -> None:
        self.model, self.fill = model, fill
        self.blocks = model.model.layers
        self.entries: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in self.blocks]
        self.hidden: list[Tensor] = []
        self.positions: list[int] = []
        self.depths: list[int] = []
        self.logits: list[Tensor] = []

    def run(self, ids: Sequence[int], positions: Sequence[int], depths: Sequence[int]) -> Reference:
        """Feeds tokens one by one; `depths` has the number of blocks for those of the prompt."""
        for token, position, depth in zip(ids, positions, depths, strict=True):
            self.step(token, position, depth)
        return self

    def step(self, token: int, position: int, depth: int) -> None:
        if self.fill == "monotone" and self.depths:
            depth = min(depth, self.depths[-1])
        index = len(self.hidden)
        self.hidden.append(self.model.model.embed_tokens(torch.tensor([[token]])))
        self.positions.append(position)
        self.depths.append(depth)
        for number in range(depth):
            if self.fill == "recompute":
                for earlier in range(index):
                    if earlier not in self.entries[number]:
                        self.run_block(number, earlier)
            self.run_block(number, index)
        if self.fill == "propagate":
            for number in range(depth, len(self.blocks)):
                self.entries[number][index] = self.project(number, index)[1:]
        self.logits.append(self.model.lm_head(self.model.model.norm(self.hidden[index]))[0, 0])

    def run_block(self, number: int, index: int) -> None:
        """Takes one token's hidden state through one block."""
        block, hidden = self.blocks[number], self.hidden[index]
        query, key, value = self.project(number, index)
        self.entries[number][index] = key, value
        read = [self.entries[number][i] for i in range(index + 1) if i in self.entries[number]]
        keys, values = (torch.stack(part) for part in zip(*read, strict=True))  # [tokens, kv heads, head dim]
        groups = query.shape[0] // keys.shape[1]
        heads = []
        for head in range(query.shape[0]):
            scores = keys[:, head // groups] @ query[head] * query.shape[1] ** -0.5
            heads.append(scores.softmax(0) @ values[:, head // groups])
        hidden = hidden + block.self_attn.o_proj(torch.cat(heads)[None, None])
        self.hidden[index] = hidden + block.mlp(block.post_attention_layernorm(hidden))

    def project(self, number: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query, key and value of a token's hidden state in front of a block, ``[heads, head dim]``."""
        attention, hidden = self.blocks[number].self_attn, self.blocks[number].input_layernorm(self.hidden[index])
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(hidden).view(1, 1, -1, attention.head_dim).transpose(1, 2) for p in projections)
        cosines = self.model.model.rotary_emb(hidden, torch.tensor([[self.positions[index]]]))
        query, key = apply_rotary_pos_emb(query, key, *cosines)
        return query[0, :, 0], key[0, :, 0], value[0, :, 0]
