"""Greedy decoding and sampling in a loop of the package's own: ``generate(custom_generate=river_compile.decode)``.

The same processors, stopping criteria and streamers in the same order with the same arguments as in transformers' loop,
and the same tokens; what a step is given is made in less time (`runtime/pass_inputs.py`).

On a GPU with a static cache a step is queued before the host has read what the one before it chose: its ids come from
the device. Where a text turns out to have ended, that step is taken back from the cache, and nobody sees more of it
than the report, which counts it.

    host     choose t | queue step t+1 | read token t, streamer | choose t+1 | queue step t+2 | ...
    device   ........ step t ......... | ................... step t+1 ................... | ...

Not handled (a DecodeError that says so): beams and assisted modes, encoder-decoder models, attention weights and hidden
states as outputs, generation that is synchronized over processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria

from river_compile.distributed.ranks import Ranks, ranks_of
from river_compile.errors import DecodeError
from river_compile.kept_cache import LentCache, lent_cache
from river_compile.runtime.pass_inputs import Inputs, PassInputs
from river_compile.speculative.hf_frames import KeepsTokenizer, argument_of_generate, shares_cache
from river_compile.upstream.hf_cache import cache_argument, cache_of, crop
from river_compile.upstream.static_cache import is_static, sizes_of


@dataclass(frozen=True)
class Decode:
    """The callable for ``custom_generate``.

    Attributes:
        static_cache: stand a static cache for one that grows, where the caller says nothing of caches.
    """

    static_cache: bool = False
    __signature__ = KeepsTokenizer()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any | None = None,
        tokenizer: object | None = None,  # of stop_strings; taking it makes generate keep it
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by ``generate`` in place of its own loop, with its arguments.

        Raises:
            DecodeError: (a ``ValueError``) something that this loop does not handle.
            CacheFullError: (a ``ValueError``) a static cache of the user's is too small for the text.
        """
        config = generation_config
        assistant = argument_of_generate("assistant_model")
        obstacle = _obstacle(model, config, synced_gpus, assistant, cache_of(model_kwargs))
        if obstacle:
            raise DecodeError(f"river_compile.decode is for greedy search and sampling: {obstacle}")
        streamer = streamer or argument_of_generate("streamer")
        ranks = ranks_of(model.parameters())
        choice = _Choice(config, logits_processor, stopping_criteria, input_ids, ranks)
        with lent_cache(model, input_ids, config, model_kwargs, shares_cache(config), self.static_cache) as lent:
            self._run(model, config, lent, choice, streamer)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return choice.ids_BS
        kept = {"scores": choice.scores, "logits": choice.logits, cache_argument(model): cache_of(model_kwargs)}
        return GenerateDecoderOnlyOutput(sequences=choice.ids_BS, **kept)

    def _run(
        self, model: PreTrainedModel, config: GenerationConfig, lent: LentCache, choice: _Choice, streamer: Any | None
    ) -> None:
        """Generates until every row has ended."""
        outputs = model._prefill(choice.ids_BS, config, lent.kwargs, not config.is_assistant)
        kwargs = model._update_model_kwargs_for_generation(outputs, lent.kwargs)
        steps = _Steps(model, lent, choice, kwargs)
        with model._optimize_model_for_decode():
            while True:
                told = choice.next(outputs.logits)
                del outputs
                queued = steps.next() if choice.goes_on_by_length and steps.may_be_taken_back else None
                tokens_B, any_active = told.read()
                if streamer is not None:
                    streamer.put(tokens_B)
                if not any_active:
                    break
                outputs, queued = steps.next() if queued is None else queued, None
        if queued is not None:
            steps.take_back()


decode = Decode()


class _Steps:
    """The steps of one call of generate after its prompt.

    Args:
        kwargs: of the first step, the prompt's outputs included.
    """

    def __init__(self, model: PreTrainedModel, lent: LentCache, choice: _Choice, kwargs: dict[str, Any]) -> None:
        self._model, self._lent, self._choice, self._kwargs = model, lent, choice, kwargs
        self._queues = runs_late(model.device) and not choice.shared
        self._taken = 0
        self._go_on_with(cache_of(kwargs))
        self._filled = int(self._cache.get_seq_length())

    def _go_on_with(self, cache: Cache | None) -> None:
        assert cache is not None, "a call without a cache is refused"
        self._cache, self._inputs = cache, PassInputs(self._model)
        # (A full sliding window has forgotten what a step pushed out of it.)
        self._room = min(sizes_of(cache)) if is_static(cache) else 0

    @property
    def may_be_taken_back(self) -> bool:
        """Whether the next step may run before it is known that it is wanted."""
        return self._queues and self._filled + self._taken < self._room

    def next(self) -> Any:
        """Runs the last of the ids, and returns the model's outputs."""
        longer = self._lent.longer(self._cache, self._filled + self._taken, 1)
        if longer is not None:
            self._kwargs = {**self._kwargs, cache_argument(self._model): longer}
            self._go_on_with(longer)
        given = self._inputs.of(self._choice.ids_BS, 1, self._filled + self._taken, self._prepare)
        outputs = self._model(**given, return_dict=True)
        self._taken += 1
        return outputs

    def take_back(self) -> None:
        """Frees the entries of the last step."""
        crop(self._cache, 1)

    def _prepare(self) -> Inputs:
        now = self._kwargs
        if self._taken:
            now = self._model._update_model_kwargs_for_generation({}, dict(now), num_new_tokens=self._taken)
        return self._model.prepare_inputs_for_generation(self._choice.ids_BS, next_sequence_length=1, **now)


class _Told:
    """What a step chose, on its way to the host: the tokens ``[B]``, and whether any row goes on."""

    def __init__(self, tokens_B: Tensor, active_B: Tensor) -> None:
        told = torch.cat([tokens_B, active_B.any()[None].to(tokens_B.dtype)])
        self._told = told.to("cpu", non_blocking=True)  # (into pinned memory)
        self._sent = None
        if tokens_B.is_cuda:
            self._sent = torch.cuda.Event()
            self._sent.record()

    def read(self) -> tuple[Tensor, bool]:
        """Waits for it."""
        if self._sent is not None:
            self._sent.synchronize()
        *_, any_active = self._told.tolist()
        return self._told[:-1], bool(any_active)


def runs_late(device: torch.device) -> bool:
    """Whether what is called on a device has run when the call returns, or later."""
    return device.type == "cuda"


class _Choice:
    """Chooses the tokens of one call of generate, as the first of the ranks does that share the model.

    Attributes:
        ids_BS: all ids so far.
        active_B: the rows that have not ended.
        scores, logits: of each step, processed and raw ``[B, V]``, where they were asked for.
        shared: whether several ranks choose together.
    """

    def __init__(
        self,
        config: GenerationConfig,
        process: LogitsProcessorList,
        stops: StoppingCriteriaList,
        ids_BS: Tensor,
        ranks: Ranks,
    ) -> None:
        wanted = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wanted and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wanted and config.output_logits else None
        self.ids_BS, self.active_B = ids_BS, ids_BS.new_ones(ids_BS.shape[0], dtype=torch.bool)
        self._process, self._stops, self._do_sample, self._ranks = process, stops, config.do_sample, ranks
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stops)
        self._pad_token = config._pad_token_tensor.to(ids_BS.device) if ends else None
        self._longest = min((c.max_length for c in stops if isinstance(c, MaxLengthCriteria)), default=0)
        self.shared = ranks.several

    @property
    def goes_on_by_length(self) -> bool:
        """Whether the texts have fewer ids than end them; False where no length does."""
        return self.ids_BS.shape[1] < self._longest

    def next(self, logits_BSV: Tensor) -> _Told:
        """Takes the token of every row that follows, by the logits of the last position, and returns them."""
        raw_BV = logits_BSV[:, -1].to(copy=True, dtype=torch.float32, device=self.ids_BS.device)
        scores_BV = self._process(self.ids_BS, raw_BV)
        self.scores = None if self.scores is None else (*self.scores, scores_BV)
        self.logits = None if self.logits is None else (*self.logits, raw_BV)
        if self._do_sample:
            tokens_B = torch.multinomial(torch.softmax(scores_BV, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens_B = scores_BV.argmax(-1)
        if self._pad_token is not None:
            tokens_B = torch.where(self.active_B, tokens_B, self._pad_token)
        tokens_B = self._ranks.first(tokens_B)
        self.ids_BS = torch.cat([self.ids_BS, tokens_B[:, None]], dim=-1)
        self.active_B = self.active_B & ~self._ranks.first(self._stops(self.ids_BS, self.scores))
        return _Told(tokens_B, self.active_B)


def _obstacle(
    model: PreTrainedModel, config: GenerationConfig, synced_gpus: bool, assistant: object, cache: object
) -> str:
    """Returns what the loop does not handle, and what to do about it; empty where there is nothing."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"these options ask for {mode.value}; leave out num_beams and prompt_lookup_num_tokens"
    if assistant is not None:
        return f"leave out assistant_model={type(assistant).__name__}, or custom_generate"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} is an encoder-decoder model; leave out custom_generate"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name) and config.return_dict_in_generate:
            return f"{name}=True is not available; output_scores and output_logits are"
    if synced_gpus:
        return "synced_gpus=True is not available"
    return "" if cache is not None else "leave out use_cache=False"
