"""Tiny checkpoints with layers for multi-token prediction (MTP), as released ones store them.

With `gain` 0 each next token depends on the last one alone, and every proposal is right: blocks change nothing, and MTP
layers pass the last token on. With more, blocks matter more and proposals are right less often.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_layers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.families import HIDDEN
from tools.families.tiny import OVERRIDES, draw_weights, tiny_config

MtpModel = getattr(modeling_layers, "MtpModel", None)
needs_mtp = pytest.mark.skipif(MtpModel is None, reason="this release of transformers has no MTP layers")
BLOCKS = 3
FAMILIES = ("glm4_moe", "deepseek_v3", "mellum")  # the last one with a sliding window and other names
_FIELDS = {"mellum": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}}
_MELLUM = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "post_norm": "norm"}


def checkpoint(folder: Path, family: str, layers: int = 1, gain: float = 0.0, mtp_weights: bool = True) -> Path:
    """Writes a checkpoint into a new folder and returns it; `layers`: MTP layers."""
    config = tiny_config(CONFIG_MAPPING[family], {**OVERRIDES.get(family, {}), **_FIELDS.get(family, {})})
    fields = {**config.to_dict(), "num_nextn_predict_layers": layers, "num_mtp_layers": layers}
    model = AutoModelForCausalLM.from_config(type(config)(**fields), dtype=torch.float32)
    draw_weights(model, seed=0)
    _scale(model.model.layers, gain)
    folder = folder / f"{family}-{layers}-{gain}-{mtp_weights}"
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    if mtp_weights:
        weights = _mtp_weights(model, layers, gain)
        file = folder / "model.safetensors"
        save_file({**load_file(file), **weights}, file, metadata={"format": "pt"})
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def register(patch: pytest.MonkeyPatch) -> None:
    """Has transformers look for MTP layers behind the blocks of these checkpoints, as it does for released ones."""
    behind = [rf"model\.layers\.{BLOCKS + number}\." for number in range(4)]
    for name in ("Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"):
        patch.setattr(f"transformers.{name}._keys_to_ignore_on_load_unexpected", behind)


@torch.no_grad()
def _scale(blocks: nn.Module, gain: float) -> None:
    """Multiplies what blocks add to the hidden states."""
    for name, weight in blocks.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.mul_(gain)


@torch.no_grad()
def _mtp_weights(model: PreTrainedModel, layers: int, gain: float) -> dict[str, torch.Tensor]:
    """Returns the weights of MTP layers by their names in a checkpoint."""
    mtp = MtpModel(model, layers)
    own = nn.ModuleList(mtp.layers)
    draw_weights(own, seed=1)
    for layer in own:
        _scale(layer.mtp_block, gain)
        nn.init.ones_(layer.enorm.weight)
        layer.eh_proj.weight.copy_(torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1))
        layer.post_norm.weight.copy_(model.model.norm.weight)
    named: dict[str, torch.Tensor] = {}
    for name, weight in own.state_dict().items():
        number, _, rest = name.partition(".")
        for checkpointed, value in _unfused(rest, weight):
            named[_named(checkpointed, int(number), model.config.model_type)] = copy.deepcopy(value).contiguous()
    return named


def _unfused(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Returns a weight as a checkpoint has it: experts one by one, with gate and up apart."""
    stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
    if name.endswith("experts.gate_up_proj"):
        halves = [(f"{stem}{i}.{kind}.weight", w) for i, rows in enumerate(weight)
                  for kind, w in zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True)]  # fmt: skip
        return halves
    if name.endswith("experts.down_proj"):
        return [(f"{stem}{i}.down_proj.weight", rows) for i, rows in enumerate(weight)]
    return [(name, weight)]


def _named(name: str, number: int, family: str) -> str:
    first, _, rest = name.partition(".")
    if family == "mellum":
        return f"mtp.layers.{number}.{rest}" if first == "mtp_block" else f"mtp.{_MELLUM[first]}.{rest}"
    own = rest if first == "mtp_block" else name.replace("post_norm", "shared_head.norm")
    return f"model.layers.{BLOCKS + number}.{own}"
