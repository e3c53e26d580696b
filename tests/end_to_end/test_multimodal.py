"""Models that read pictures: Dynamo breaks the prompt's graph, and exact mode is the plain model's text all the same.

The pieces of a broken graph carry different parameters of one model, which the backend must take for one model.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import river_compile
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.record import find_record
from tests.support.lowerings import OPERATORS

IMAGE, BEGIN, END = 100, 101, 102
TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
EAGER = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1}
NEW_TOKENS = 10


def llava() -> tuple[AutoConfig, dict]:
    """A picture of four patches."""
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": 32}
    vision |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vision_config": vision, "vision_feature_layer": -1, "text_config": {"model_type": "llama", **TEXT}}
    return AutoConfig.for_model("llava", image_token_id=IMAGE, **config), {"pixel_values": torch.randn(1, 3, 28, 28)}


@pytest.mark.slow
def test_exact_mode_reads_a_picture():
    """The text in float32 is the plain model's, drafts of the twins among it, and all graphs belong to one model."""
    torch.manual_seed(0)
    config, picture = llava()
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    ids = torch.tensor([[5, BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 8]])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    plain = model.generate(ids, **picture, **options)
    other = model.generate(ids, **{**picture, "pixel_values": -picture["pixel_values"]}, **options)
    assert not torch.equal(other, plain), "the text must depend on the picture"
    model.compile(backend=river, options=EAGER)
    exactly = {"custom_generate": exact, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"}
    with river_compile.trace() as trace, pytest.warns(river_compile.RiverWarning, match="cannot rewrite this graph"):
        ours = model.generate(ids, **picture, **options, **exactly)
    assert torch.equal(ours, plain)
    assert trace.kept_sources["river"] > 0
    assert {find_record(part) for part in model.model.children()} == {find_record(model)}
