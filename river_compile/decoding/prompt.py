"""The prompt of a call: in one pass or in pieces, through a known program or through the model.

Not handled: how a pass runs (`passes.py`).
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from river_compile.decoding.inputs import BY_SLOT, KNOWN, Inputs, with_all_logits, with_masks
from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.passes import Passes
from river_compile.exits import forced_depth
from river_compile.tracing.program_for import run_model
from river_compile.upstream.dynamo import OwnCall
from river_compile.upstream.transformers import cache_of


class Prompt:
    """One prompt ``[B, S]``, of which the cache of the passes may hold the first tokens."""

    def __init__(self, passes: Passes, ids_BS: Tensor, config: GenerationConfig) -> None:
        self._passes, self._ids_BS, self._config = passes, ids_BS, config
        self._of_slots: dict[str, Tensor] | None = None  # masks and positions, if pieces run
        self._is_accelerated = passes.record.find(OwnCall) is not None  # else the caller's compilation runs

    def run(self, all_logits: bool = False) -> Tensor:
        """Run all of it; return the last or all logits."""
        chunk = self._config.prefill_chunk_size if self._is_accelerated else None
        if chunk is None or all_logits:
            return self._run_first(self._ids_BS, all_logits)
        while (logits := self.piece(chunk)) is None:
            pass
        return logits

    def piece(self, tokens: int) -> Tensor | None:
        """Run the next `tokens` of it through an accelerated model; return its last logits, None before."""
        passes, whole, filled = self._passes, self._ids_BS.shape[1], self._passes.kv.filled
        # The last piece has at least `tokens`, so that it runs like a prompt and not like a few decode steps.
        upto = whole if whole - filled < 2 * tokens else filled + tokens
        ids_BS, is_first = self._ids_BS[:, :upto], self._of_slots is None
        if self._of_slots is None:
            given = passes.kwargs
            self._of_slots = {name: given[name] for name in BY_SLOT if isinstance(given.get(name), Tensor)}
        passes.kwargs |= {name: value[..., :upto] for name, value in self._of_slots.items()}
        passes.kwargs_tokens = upto
        if is_first:
            logits = self._run_first(ids_BS)
        else:
            logits = passes.run_once(passes.prepare_inputs(ids_BS, upto - filled), upto - filled)
        return logits if upto == whole else None

    def _run_first(self, ids_BS: Tensor, all_logits: bool = False) -> Tensor:
        """Run ids in one pass; return the last or all logits."""
        passes, kept = self._passes, self._passes.kv.filled
        inputs = self._rest_inputs(ids_BS) if kept else self._inputs(ids_BS)
        outputs: Any = {}
        if inputs is not None:
            logits = passes.run_once(inputs, ids_BS.shape[1] - kept, all_logits)
        else:
            ran = run_model(functools.partial(self._run_model, ids_BS), keeps_hidden=passes.keeps_hidden)
            passes.programs.note(ran)
            passes.keep_hidden(ran)
            outputs = ran.outputs
            logits = outputs.logits if all_logits else outputs.logits[:, -1:]
        passes.kwargs = passes.model._update_model_kwargs_for_generation(outputs, passes.kwargs)
        if inputs is None:
            cache = cache_of(passes.kwargs)
            assert cache is not None, "a generation without a cache is refused"
            if cache is passes.kv.cache:
                passes.kv.take_in()
            else:
                passes.kv = KVCache(cache)
        passes.reset()
        passes.kwargs_tokens = passes.kv.filled + 1
        return logits

    def _inputs(self, ids_BS: Tensor) -> Inputs | None:
        """Return the inputs of a prompt that runs like any other pass; None for others."""
        passes = self._passes
        if not self._is_accelerated or not KNOWN.issuperset(passes.kwargs):
            return None
        if not (passes.kv.is_full and passes.kv.memory_rows):  # allocating the cache is not in the graph
            return None
        return with_all_logits(with_masks(passes.model, self._first_inputs(ids_BS)))

    def _rest_inputs(self, ids_BS: Tensor) -> Inputs:
        """Return the inputs of the tokens that the cache lacks."""
        self._passes.kwargs_tokens = ids_BS.shape[1]
        return self._passes.prepare_inputs(ids_BS, ids_BS.shape[1] - self._passes.kv.filled)

    def _first_inputs(self, ids_BS: Tensor) -> Inputs:
        model, first = self._passes.model, not self._config.is_assistant
        inputs: Inputs = model.prepare_inputs_for_generation(ids_BS, is_first_iteration=first, **self._passes.kwargs)
        return inputs

    def _run_model(self, ids_BS: Tensor) -> Any:
        """Return the model's outputs for any prompt."""
        passes = self._passes
        if self._is_accelerated:
            return passes.programs.call_model(self._first_inputs(ids_BS), passes.depth)
        with forced_depth(passes.depth):  # a prompt of one token is a decode step
            return passes.model._prefill(ids_BS, self._config, passes.kwargs, not self._config.is_assistant)
