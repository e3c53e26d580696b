"""Which sources draft for a text: an assistant, the checkpoint's MTP layers, the model's own twins.

Not handled: copies from the context (`sampling.py`), and how long each drafts (`draft_length.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from river_compile.decoding.assistant import Assistant, prepare, why_not_assistant
from river_compile.decoding.drafters import Drafter, Twins
from river_compile.decoding.mtp import Mtp, load_mtp, mtp_layers, why_not_mtp
from river_compile.decoding.passes import Passes


def why_no_source(
    model: PreTrainedModel, assistant: PreTrainedModel | None, use_mtp: bool, *, tries_again: bool = False
) -> str:
    """Return which source of these cannot draft for a model, why, and the fix; empty if all can.

    Args:
        tries_again: whether MTP layers are loaded that could not be loaded before.
    """
    if assistant is not None and (why_not := why_not_assistant(model, assistant)):
        return f"assistant_model={type(assistant).__name__} is not available: {why_not}"
    load = load_mtp if tries_again else why_not_mtp
    if use_mtp and (why_not := load(model)):
        return f"use_mtp=True is not available: {why_not}"
    return ""


def sources_of(
    passes: Passes, assistant: PreTrainedModel | None, least_probability: float | None, use_mtp: bool, twins: bool
) -> Iterator[Drafter]:
    """Yield what drafts for passes whose prompt has run.

    Args:
        least_probability: a token of the assistant that is less probable ends its draft.
        twins: whether the model's own twins may draft.
    """
    assert passes.graph is not None, "drafts are allowed"
    if assistant is not None:
        prepare(assistant, passes.record, passes.graph.config)
        yield Assistant(assistant, passes.vocabulary, least_probability)
    if use_mtp:
        yield Mtp(passes, mtp_layers(passes.record))
    if passes.graph.config.exit_depth is None and twins:
        yield Twins(passes)
