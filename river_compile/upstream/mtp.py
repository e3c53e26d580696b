"""The layers for multi-token prediction (MTP) that some checkpoints have besides the model's, in transformers' code.

Layer k proposes the token k + 2 places after a hidden state, and reads the token k + 1 places after it. Not handled:
releases of transformers without such layers (`why_no_mtp` says so); layers on several devices.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, cache_utils, modeling_layers

_Model: Any = getattr(modeling_layers, "MtpModel", None)
_Cache: Any = getattr(cache_utils, "MtpCache", None)


class MtpLayers:
    """The MTP layers of one model. They share its embedding, norm and head, which they hold while they are tied."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.device = _home(model)
        with torch.inference_mode(False):
            self._model: Any = _Model.from_pretrained(model, device_map={"": self.device})
        self._model.eval().requires_grad_(False)
        self._norm: Any = None
        self.untie()

    def __len__(self) -> int:
        return len(self._model.layers)

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether they are on the model's device, in its dtype."""
        return self.device == _home(model) and self._model.dtype == model.dtype

    def tie(self, model: PreTrainedModel) -> None:
        """Share the model's embedding, norm and head until :meth:`untie`."""
        self._model.tie_with_main_model(model)
        self._norm = _decoder(model).norm

    def untie(self) -> None:
        """Hold nothing of the model, so that it can be freed."""
        self._model.embed_tokens = self._model.shared_head = self._model.rotary_emb = self._norm = None

    def new_cache(self) -> Any:
        """Return an empty KV cache for a text."""
        cache = _Cache(config=self._model.config)
        cache.activate_past_recording()
        return cache

    def normed(self, hidden_1TD: Tensor) -> Tensor:
        """Return the model's last hidden states as the first layer reads them: after the final norm."""
        normed: Tensor = self._norm(hidden_1TD)
        return normed.to(self.device)

    def run(self, layer: int, hidden_1TD: Tensor, ids_1T: Tensor, position: int, cache: Any) -> Tensor:
        """Run a layer behind its entries in the cache; return its hidden states, which the next layer reads.

        Args:
            layer: its number.
            hidden_1TD: those of the layer before, of the model for the first one.
            ids_1T: for each of them the token that is `layer` + 1 places further.
            position: of the first of these tokens.
            cache: of the text.
        """
        positions = torch.arange(position, position + ids_1T.shape[1], device=self.device)[None]
        hidden: Tensor = self._model.forward_layer(
            layer, hidden_1TD, positions, cache, input_ids=ids_1T.to(self.device)
        )
        return hidden

    def logits(self, hidden_1TD: Tensor) -> Tensor:
        """Return the logits ``[1, V]`` of the token that the last hidden state proposes."""
        logits: Tensor = self._model._project_to_logits(hidden_1TD[:, -1:])
        return logits[:, 0]


def crop(cache: Any, layer: int, tokens: int) -> None:
    """Remove the last entries of a layer. Sliding windows keep all entries until this is called, also with none."""
    cache.layers[layer].crop(-tokens)


def why_no_mtp(model: PreTrainedModel) -> str:
    """Return why a model has no MTP layers that could be loaded; empty where its files decide."""
    kind = type(model).__name__
    if _Model is None or _Cache is None or not hasattr(_Model, "forward_layer"):
        return f"transformers {transformers.__version__} has no MTP layers. Update transformers"
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "num_mtp_layers", None):
        return f"the configuration of this {kind} names no MTP layers (num_mtp_layers). Remove it"
    if not model._keys_to_ignore_on_load_unexpected:
        return f"transformers does not know which weights of {kind} are MTP layers. Remove it"
    if not (hasattr(model, "lm_head") and hasattr(_decoder(model), "layers") and hasattr(_decoder(model), "norm")):
        return f"{kind} has no final norm or head that MTP layers could share. Remove it"
    if not model.config.name_or_path:
        return f"this {kind} was not loaded from a checkpoint, where its MTP layers are. Remove it"
    return ""


def _decoder(model: PreTrainedModel) -> Any:
    return model.get_decoder()


def _home(model: PreTrainedModel) -> torch.device:
    device: torch.device = model.get_output_embeddings().weight.device
    return device
