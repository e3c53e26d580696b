"""Whether the prompt of a call may begin with a text that an earlier call left in the model's cache, and leave one.

Its entries must depend on its ids alone, beside what the model is at the moment. Not handled (a fresh prompt, of which
nothing is kept): batches, padding, positions or embeddings that the caller gives, prompts in chunks; models that were
not accelerated, or that prepare their inputs in a way of their own; prompts that leave the backbone; `strict` where a
library multiplies the rows of a prompt, whose sums may depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from river_compile.decoding.inputs import KNOWN, prepares_as_most_do
from river_compile.kernels.native.load import any_rows, loaded
from river_compile.model_state import ModelLook
from river_compile.runtime.kept_texts import Prompt
from river_compile.upstream.transformers import is_of_transformers


def prompt_of(
    model: PreTrainedModel,
    ids_BS: Tensor,
    config: GenerationConfig,
    kwargs: Mapping[str, object],
    look: ModelLook | None,
    strict: bool,
) -> Prompt | None:
    """Returns the prompt of a call for `runtime.cache_pool.borrowed_cache`, None where it must be a fresh one.

    Args:
        model: generates.
        ids_BS: of the prompt.
        config: of the call.
        kwargs: of its forward passes.
        look: at the model, None where it was not accelerated.
        strict: whether entries must have the bits that a fresh prompt gives them.
    """
    if look is None or look.config.prefill != "backbone":
        return None
    if strict and loaded() and not any_rows(model.dtype):
        return None
    known = is_of_transformers(model) and prepares_as_most_do(model) and KNOWN.issuperset(kwargs)
    if not known or config.prefill_chunk_size is not None or len(ids_BS) != 1 or not _counts_all(ids_BS, kwargs):
        return None
    return Prompt(ids_BS[0].cpu(), lambda: look.state)


def _counts_all(ids_1S: Tensor, kwargs: Mapping[str, object]) -> bool:
    """Whether mask and positions are those of a text without padding."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids_1S.shape and bool(mask.all())):
        return False
    if positions is None:
        return True
    expected = torch.arange(ids_1S.shape[1]).expand_as(ids_1S)
    return isinstance(positions, Tensor) and torch.equal(positions.cpu(), expected)
