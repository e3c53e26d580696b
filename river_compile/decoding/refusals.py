"""What a call of generate may ask for that River's loop does not do, each with its fix.

Not handled: what a mode adds (`mode.py`), and drafts that cannot be verified (`admission.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from river_compile.decoding.given import Given
from river_compile.decoding.inputs import BY_SLOT
from river_compile.kernels.checks import short_repr
from river_compile.record import record_of
from river_compile.upstream.dynamo import OwnCall, current_stance
from river_compile.upstream.transformers import cache_of

# Settings that make transformers search in another way than token by token, and the values that do not.
_SEARCHES = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "use_mtp": (None, False),
    "assistant_early_exit": (None,),
    "prompt_lookup_num_tokens": (None,),
}


@dataclass(frozen=True)
class Request:
    """What a call of generate asks for."""

    model: PreTrainedModel
    rows: int  # of input_ids
    config: GenerationConfig
    synced_gpus: bool
    given: Given
    kwargs: Mapping[str, object]  # of the model


def why_refused(request: Request, *, drafts: bool) -> str:
    """Return what is not available, and the fix; empty if all is. `drafts`: whether the mode is the assisted one."""
    model, config, given = request.model, request.config, request.given
    mode = config.get_generation_mode()
    if given.kwargs.get("assistant_tokenizer") is not None:
        return "assistant_tokenizer= is not available, since drafts need the model's own tokens. Remove it"
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and not drafts:
        return f"{mode.value} is not available. Remove {_asking_for(config)}"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} is an encoder-decoder model. Use a decoder-only model"
    # Without a dict they are not returned, but the forward gets them: Falcon's then masks otherwise.
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            return f"{name}=True is not available. Remove it, or use output_scores or output_logits"
    if request.synced_gpus:
        return "synced_gpus=True is not available, since processes run different numbers of passes. Remove it"
    if model.config.get_text_config(decoder=True)._attn_implementation == "flex_attention":
        # Its masks read a static cache's length when attention runs, which is after the pass has advanced it.
        return "attn_implementation='flex_attention' requires a cache that grows. Use attn_implementation='sdpa'"
    if cache_of(request.kwargs) is None:
        return "use_cache=False is not available, since decoding needs the KV cache. Remove it"
    if given.cache is not None:
        return f"past_key_values={type(given.cache).__name__} is not available: River has its own KV cache. Remove it"
    if config.cache_implementation not in (None, "static"):
        return f"cache_implementation={config.cache_implementation!r} is not available. Remove it, or use 'static'"
    if config.prefill_chunk_size is not None and not _is_cut_by_tokens(request.kwargs):
        return "prefill_chunk_size is not available with other inputs than ids and 2D masks. Remove it"
    if current_stance() == "force_eager" and record_of(model.parameters()).find(OwnCall) is not None:
        return "torch.compiler.set_stance('force_eager') turns compilation off. Set the stance 'default'"
    return _other_rows(request.rows, request.kwargs)


def _asking_for(config: GenerationConfig) -> str:
    """Return the settings of a config that ask for its generation mode."""
    given = ((name, getattr(config, name, None)) for name in _SEARCHES)
    return " and ".join(f"{name}={short_repr(value)}" for name, value in given if value not in _SEARCHES[name])


def _is_cut_by_tokens(model_kwargs: Mapping[str, object]) -> bool:
    """Whether a prompt's first tokens are the first columns of all its tensors."""
    given = {name: value for name, value in model_kwargs.items() if isinstance(value, Tensor)}
    return given.keys() <= {*BY_SLOT} and all(
        value.ndim == 2 or name == "position_ids" for name, value in given.items()
    )


def _other_rows(rows: int, model_kwargs: Mapping[str, object]) -> str:
    """Return a message if inputs and ids have different numbers of rows."""
    for name, fitting in (("attention_mask", (rows,)), ("position_ids", (1, rows))):
        given = model_kwargs.get(name)
        if isinstance(given, Tensor) and given.ndim in (2, 3) and given.shape[-2] not in fitting:
            return f"input_ids have {rows} rows, and {name} has {given.shape[-2]}. Give one for each text"
    return ""
