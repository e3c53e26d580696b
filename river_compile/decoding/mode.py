"""`decode` and `exact`, the values of ``model.generate(**inputs, custom_generate=...)``, and one call's arguments.

Not handled (an error that says so): beams and transformers' assisted modes, encoder-decoder models, attention weights
and hidden states as outputs, generation that is synchronized over processes; with drafts, recurrent states.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from river_compile.decoding.admission import allow_drafts
from river_compile.decoding.draft_length import DraftLength, DraftLengths
from river_compile.decoding.given import Given
from river_compile.decoding.inputs import BY_SLOT, KNOWN, prepares_as_most_do
from river_compile.decoding.joining import OpenBatch, alone
from river_compile.decoding.kv_cache import KVCache, masks_by_slots, why_no_rewind
from river_compile.decoding.passes import Passes, PromptRows
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.decoding.processors import STATELESS
from river_compile.decoding.prompt import Prompt
from river_compile.decoding.sampling import Sampler
from river_compile.decoding.speculative import Ends, SpeculativeDecoder, Texts
from river_compile.errors import DecodeError, ExactModeError, OptionError
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, integer, one_of, optional, short_repr
from river_compile.kernels.native.load import any_rows, loaded
from river_compile.model_state import model_state
from river_compile.ranks import Ranks
from river_compile.record import record_of
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.dynamo import OwnCall, current_stance
from river_compile.upstream.transformers import (
    cache_argument,
    cache_of,
    is_transformers_model,
)

_ROW_BY_ROW = {MaxLengthCriteria, EosTokenCriteria, StopStringCriteria}

CONSTANT = "constant"
_CHECKS = {
    "num_assistant_tokens": optional(integer(0)),
    "num_assistant_tokens_schedule": one_of(None, CONSTANT),
    "prompt_lookup_num_tokens": optional(integer(0)),
    "strict": FLAG,
}

Generated: TypeAlias = Tensor | GenerateDecoderOnlyOutput


@dataclass(frozen=True)
class Call:
    """The arguments of a ``custom_generate`` callable."""

    model: PreTrainedModel
    ids_BS: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any | None

    def texts(self, ranks: Ranks, drafting: bool, generator: torch.Generator | None = None) -> Texts:
        """Return the call's rows, with their prompt; without a generator, sampling uses PyTorch's."""
        config, criteria, wanted = self.config, self.criteria, bool(self.config.return_dict_in_generate)
        ends = getattr(config, "_eos_token_tensor", None)
        sampler = Sampler(
            rows=len(self.ids_BS),
            do_sample=config.do_sample,
            processors=self.processors,
            ranks=ranks,
            drafting=drafting,
            generator=generator,
            keeps_scores=wanted and config.output_scores,
            keeps_logits=wanted and config.output_logits,
        )
        return Texts(
            prompt=self.ids_BS,
            sampler=sampler,
            stops=_ends(criteria) or criteria,
            max_length=math.ceil(min(config.max_length, sys.maxsize)),  # generate takes 17.5 and inf too
            pad_token=self.pad_token,
            put=None if self.streamer is None else self.streamer.put,
            rows_are_independent=self._row_by_row and not wanted,
            end_tokens=frozenset(() if ends is None else ends.tolist()),
            ranks=ranks,
        )

    @property
    def _row_by_row(self) -> bool:
        """Whether processors and criteria see each row alone, without memory."""
        # Without an end token there is no padding, so a row that a stop string ended continues with the others.
        kinds = {type(criterion) for criterion in self.criteria}
        ends_alone = StopStringCriteria not in kinds or EosTokenCriteria in kinds
        return ends_alone and kinds <= _ROW_BY_ROW and all(type(p) in STATELESS for p in self.processors)

    @property
    def pad_token(self) -> int | None:
        """The token of ended rows while others run; None if rows end together."""
        ends = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        pad = self.config._pad_token_tensor
        return int(pad) if ends and pad is not None else None

    def prefix_ids(self, kwargs: Mapping[str, object], strict: bool) -> Tensor | None:
        """Return the ids of a prompt that may use the prefix cache; None if its KV entries depend on more than ids."""
        # With `strict`, entries have the bits of a fresh prompt, so no library may multiply: its sums depend on rows.
        model, ids_BS = self.model, self.ids_BS
        programs = record_of(model.parameters()).find(ProgramCache)
        if programs is None or programs.config.prefill != "backbone":
            return None
        if strict and loaded() and not any_rows(model.dtype):
            return None
        known = is_transformers_model(model) and prepares_as_most_do(model) and KNOWN.issuperset(kwargs)
        if not known or self.config.prefill_chunk_size is not None or len(ids_BS) != 1 or not ids_BS.shape[1]:
            return None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids_BS.shape and bool(mask.all())):
            return None
        expected = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        if positions is not None and not (isinstance(positions, Tensor) and torch.equal(positions.cpu(), expected)):
            return None
        return ids_BS[0].cpu()

    def result(self, ids_BS: Tensor, sampler: Sampler, kv: KVCache, made: Cache | None) -> Generated:
        """Return the result of ``generate``; `made` is the KV cache that generate made, to return."""
        if not self.config.return_dict_in_generate:
            return ids_BS
        if kv.is_full and made is not None:
            kv.copy_to(made)
        return GenerateDecoderOnlyOutput(
            sequences=ids_BS,
            scores=None if sampler.scores is None else tuple(sampler.scores),
            logits=None if sampler.logits is None else tuple(sampler.logits),
            **{cache_argument(self.model): made if kv.is_full else kv.cache},
        )


@dataclass(frozen=True)
class Decode:
    """Greedy decoding and sampling with transformers' processors, stopping criteria and streamers."""

    refusal: ClassVar[type[DecodeError | ExactModeError]] = DecodeError
    depth: ClassVar[int | None] = None  # of decode steps; None: by the exit policy

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any | None = None,
        tokenizer: object | None = None,  # of stop_strings, which are criteria here
        strict: bool | None = None,  # of exact mode, for this call
        given: Given | None = None,  # by the caller; None: read from the running generate
        **model_kwargs: Any,
    ) -> Generated:
        """Run ``generate``'s loop; raise `refusal` for an unsupported call, an OptionError for a bad option."""
        config = generation_config
        given = given or Given.of_running_call()
        mode, streamer = self.for_call(given, strict), streamer or given.streamer
        obstacle = mode.obstacle(model, len(input_ids), config, synced_gpus, given, model_kwargs)
        if obstacle:
            raise self.refusal(obstacle)
        if input_ids.dtype == torch.int32:
            input_ids = input_ids.long()  # (new tokens are, and so is what generate returns)
        call = Call(model, input_ids, logits_processor, stopping_criteria, config, streamer)
        record = record_of(model.parameters())
        batch = record.of(OpenBatch).batch
        joined = None if batch is None else batch.join(call, mode, model_kwargs)
        if joined is not None:
            return joined
        with alone(record):
            passes, text = mode.passes(call, model_kwargs), None
            try:
                logits = Prompt(passes, input_ids, config).run()[:, -1:]
                record.of(PromptRows).add(len(input_ids))
                decoder = mode.decoder(call, passes, logits)
                texts = call.texts(passes.ranks, decoder.drafts)
                with model._optimize_model_for_decode():
                    ids = decoder.run(texts, logits)
                # With early exits, some entries of new tokens are the twins'.
                text = ids[:, : passes.kv.filled] if self.depth == WHOLE else input_ids
                passes.write_programs()
                if streamer is not None:
                    streamer.end()
                return call.result(ids, texts.sampler, passes.kv, cache_of(model_kwargs))
            finally:
                passes.release(text, input_ids.shape[1])

    def passes(self, call: Call, kwargs: Mapping[str, Any]) -> Passes:
        """Return the passes on a KV cache that may hold a prefix of the prompt."""
        model, ids_BS = call.model, call.ids_BS
        record = record_of(model.parameters())
        programs = record.find(ProgramCache)
        state = None if programs is None else model_state(model, programs.config)
        ids = call.prefix_ids(kwargs, isinstance(self, ExactMode) and self.strict)
        embeds = kwargs.get("inputs_embeds")  # in place of ids, or of ids before them
        tokens = max(given.shape[1] for given in (ids_BS, embeds) if given is not None)
        made = cache_of(kwargs)
        assert made is not None, "a generation without a cache is refused"
        kv = KVCache(made)
        # The masks of CPM-Ant and GPT-Neo are for caches that grow.
        if model._can_compile_fullgraph or (prepares_as_most_do(model) and not masks_by_slots(model)):
            entries = None if state is None else state.of_entries
            ours, _ = record.of(PrefixPool).acquire(model, len(ids_BS), tokens, ids, entries)
            kv = ours if ours.is_full else kv
        return Passes(model, kwargs, kv, self.depth, state, keeps_text=ids is not None)

    def obstacle(
        self,
        model: PreTrainedModel,
        rows: int,
        config: GenerationConfig,
        synced_gpus: bool,
        given: Given,
        model_kwargs: Mapping[str, object],
    ) -> str:
        """Return an unsupported request and its fix, or an empty string."""
        mode = config.get_generation_mode()
        if given.assistant_model is not None:
            return f"assistant_model={type(given.assistant_model).__name__} is not available. Remove it"
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and not self.copies(config):
            return f"{mode.value} is not available. Remove {_asking_for(config)}"
        if model.config.is_encoder_decoder:
            return f"{type(model).__name__} is an encoder-decoder model. Use a decoder-only model"
        # Without a dict they are not returned, but the forward gets them: Falcon's then masks otherwise.
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                return f"{name}=True is not available. Remove it, or use output_scores or output_logits"
        if synced_gpus:
            return "synced_gpus=True is not available, since processes run different numbers of passes. Remove it"
        if model.config.get_text_config(decoder=True)._attn_implementation == "flex_attention":
            # Its masks read a static cache's length when attention runs, which is after the pass has advanced it.
            return "attn_implementation='flex_attention' requires a cache that grows. Use attn_implementation='sdpa'"
        if cache_of(model_kwargs) is None:
            return "use_cache=False is not available, since decoding needs the KV cache. Remove it"
        if given.cache is not None:
            return (
                f"past_key_values={type(given.cache).__name__} is not available: River has its own KV cache. Remove it"
            )
        if config.cache_implementation not in (None, "static"):
            return f"cache_implementation={config.cache_implementation!r} is not available. Remove it, or use 'static'"
        if config.prefill_chunk_size is not None and not _is_cut_by_tokens(model_kwargs):
            return "prefill_chunk_size is not available with other inputs than ids and 2D masks. Remove it"
        if current_stance() == "force_eager" and record_of(model.parameters()).find(OwnCall) is not None:
            return "torch.compiler.set_stance('force_eager') turns compilation off. Set the stance 'default'"
        return _other_rows(rows, model_kwargs)

    def decoder(self, call: Call, passes: Passes, logits: Tensor) -> SpeculativeDecoder:
        """Return the decoder for a call whose prompt ran; raise an ExactModeError if drafts cannot be verified."""
        return SpeculativeDecoder(passes)

    def for_call(self, given: Given, strict: bool | None = None) -> Decode:
        """Return the mode with the options of one call."""
        if strict is not None:
            raise OptionError(f"strict={strict} requires custom_generate=exact, got decode. Remove it", id="RC003")
        return self

    def copies(self, config: GenerationConfig) -> bool:
        """Whether the mode does what makes a greedy or sampling config an assisted one."""
        return False


decode = Decode()


@dataclass(frozen=True)
class ExactMode(Decode):
    """Speculative decoding with the model's own output; a callable for ``generate(custom_generate=...)``.

    The options have transformers' names. Each can be given to ``generate`` too, for one call.

    Attributes:
        num_assistant_tokens: longest draft in tokens; 0: no drafts. Drafts are verified in passes of 2, 4, 6, 8, 16 ...
            ``num_assistant_tokens + 1`` tokens. None: 15, or 63 if target layers are offloaded.
        num_assistant_tokens_schedule: None: measured times decide the length of each draft. "constant": every draft has
            `num_assistant_tokens` tokens, and nothing depends on time.
        prompt_lookup_num_tokens: most tokens that a draft copies from the context. 0: none. None: as many as it has.
        strict: an error if a row of a verifying pass might have other bits than it has without drafts.

    Raises:
        OptionError: (a ``ValueError``) a bad value.
    """

    num_assistant_tokens: int | None = None
    num_assistant_tokens_schedule: str | None = None
    prompt_lookup_num_tokens: int | None = None
    strict: bool = False
    refusal: ClassVar[type[DecodeError | ExactModeError]] = ExactModeError
    depth: ClassVar[int | None] = WHOLE

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name), OptionError))

    def for_call(self, given: Given, strict: bool | None = None) -> Decode:
        settings = given.settings(("num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"))
        if str(settings.get("num_assistant_tokens_schedule")).startswith("heuristic"):
            del settings["num_assistant_tokens_schedule"]  # as a length by measured times is
        return replace(self, **settings, strict=self.strict if strict is None else strict)

    def copies(self, config: GenerationConfig) -> bool:
        early_exit, multi_token = config.assistant_early_exit, getattr(config, "use_mtp", None)
        return config.prompt_lookup_num_tokens is not None and early_exit is None and not multi_token

    def obstacle(
        self,
        model: PreTrainedModel,
        rows: int,
        config: GenerationConfig,
        synced_gpus: bool,
        given: Given,
        model_kwargs: Mapping[str, object],
    ) -> str:
        if model._is_stateful:  # refused before its prompt runs; other reasons are of the cache that it makes
            return f"{why_no_rewind(model)}. Use quality='fast', whose output changes"
        return super().obstacle(model, rows, config, synced_gpus, given, model_kwargs)

    def decoder(self, call: Call, passes: Passes, logits: Tensor) -> SpeculativeDecoder:
        if self.num_assistant_tokens == 0:
            return super().decoder(call, passes, logits)
        allow_drafts(passes, call.ids_BS, logits, self.num_assistant_tokens, self.strict)
        if self.num_assistant_tokens_schedule == CONSTANT:
            length = DraftLength(adaptive=False)
        else:
            length = passes.record.of(DraftLengths).setdefault(call.config.do_sample, DraftLength())
        copied = sys.maxsize if self.prompt_lookup_num_tokens is None else self.prompt_lookup_num_tokens
        return SpeculativeDecoder(passes, length.carry_over(passes.widths), copied)


exact = ExactMode()


def _ends(criteria: StoppingCriteriaList) -> Ends | None:
    """Return stopping criteria as length and end tokens, None if they must be called."""
    if not criteria or any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in criteria):
        return None
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    tokens = [c.eos_token_id.tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    return Ends(min(lengths, default=sys.maxsize), frozenset(itertools.chain(*tokens)))


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
