"""The model ``river`` of EleutherAI's lm-evaluation-harness (``pip install ".[eval]"``).

lm-eval scores answers by one forward pass, which runs at full depth: any exit rule would look lossless.
``scoring="decode"`` feeds each answer token by token, through the exits. Not handled: encoder-decoder models, and
decode scoring in batches.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from river_compile.api.accelerate import accelerate
from river_compile.config import RiverConfig
from river_compile.decoding.mode import exact
from river_compile.errors import OptionError
from river_compile.evaluation.meter import TextDecoder
from river_compile.kernels.checks import one_of
from river_compile.record import find_record
from river_compile.runtime.stats import ExitStats

PLAIN = "plain"
_SCORING = one_of("decode", "forward")
_SMALLEST_CACHE = 64

Scored = tuple[Any, list[int], list[int]]  # name in lm-eval's cache, context, continuation


@register_model("river")
class RiverLM(HFLM):
    """An accelerated transformers model.

    Args:
        pretrained: a folder or a model, as for ``hf``.
        quality, calibration: of `accelerate`; quality="plain" leaves the model as it is.
        scoring: "decode", or "forward" for one pass over context and answer.
        arguments: options of `accelerate`, and of ``hf``.

    Raises:
        OptionError: (a ``ValueError``) a bad argument, or a model that is no decoder.
    """

    def __init__(
        self,
        pretrained: Any,
        quality: str | None = None,
        calibration: Any = None,
        scoring: str = "decode",
        **arguments: Any,
    ) -> None:
        self.scoring = _SCORING("scoring", scoring, OptionError)
        names = RiverConfig.options().keys() | vars(exact).keys()
        self._river = {name: arguments.pop(name) for name in sorted(names & arguments.keys())}
        super().__init__(pretrained, **arguments)
        if self.backend != "causal":
            raise OptionError(f"backend={self.backend!r} is not available with lm-eval's model river. Use --model hf")
        self._quality = quality or ("exact" if calibration is None else "fast")
        if quality != PLAIN:
            accelerate(self.model, quality, calibration=calibration, background_packing=False, **self._river)
        elif self._river:
            raise OptionError(
                f"{next(iter(self._river))}= requires River, and quality='plain' runs without it. Remove one of them",
                id="RC003",
            )
        self._decoder: tuple[int, TextDecoder] | None = None

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether each of its tokens is the most likely."""
        if self.scoring == "forward":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        found = []
        for name, context, continuation in tqdm(requests, desc="river: decoding answers", disable=disable_tqdm):
            ids = torch.tensor([[*context, *continuation][-(self.max_length + 1) : -1]], device=self.device)
            logits = self._decoder_for(ids).logits(ids, ids.shape[1] - len(continuation))
            tokens = torch.tensor(continuation, device=self.device)
            log_probs = logits.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
            chosen = log_probs.gather(-1, tokens[:, None]).sum()
            found.append((float(chosen), bool((logits.argmax(-1) == tokens).all())))
            if name is not None:  # parts of a rolling text have none
                self.cache_hook.add_partial("loglikelihood", name, found[-1])
        return found

    def _decoder_for(self, ids_1S: Tensor) -> TextDecoder:
        """Return the last decoder, or a larger one if a text does not fit."""
        needed = ids_1S.shape[1]
        if self._decoder is None or self._decoder[0] < needed:
            capacity = max(_SMALLEST_CACHE, 1 << (needed - 1).bit_length())
            self._decoder = capacity, TextDecoder(self.model, capacity)
        return self._decoder[1]

    def get_model_info(self) -> dict[str, Any]:
        """Add quality, scoring and mean depth to lm-eval's results."""
        record = find_record(self.model)
        depths = record.of(ExitStats).decode if record is not None else {}
        steps = sum(depths.values())
        return {
            **super().get_model_info(),
            "quality": self._quality,
            "scoring": self.scoring,
            "river_options": self._river,
            "decode_steps": steps,
            "mean_depth": sum(depth * count for depth, count in depths.items()) / steps if steps else None,
        }
