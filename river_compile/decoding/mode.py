"""`decode` and `exact`, the values of ``model.generate(**inputs, custom_generate=...)``.

Not handled (an error that says so): beams and transformers' assisted modes, encoder-decoder models, attention weights
and hidden states as outputs, generation that is synchronized over processes; with drafts, recurrent states.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from river_compile.decoding.admission import allow_drafts
from river_compile.decoding.assistant import Assistant, prepare, why_not_assistant
from river_compile.decoding.batch import generate
from river_compile.decoding.call import Call, Generated
from river_compile.decoding.draft_length import DraftLength, DraftLengths
from river_compile.decoding.drafters import Drafter, Twins
from river_compile.decoding.given import Given
from river_compile.decoding.inputs import BY_SLOT, prepares_as_most_do
from river_compile.decoding.joining import OpenBatch, alone
from river_compile.decoding.kv_cache import KVCache, needs_own_cache, why_no_rewind
from river_compile.decoding.mtp import Mtp, load_mtp, mtp_layers, why_not_mtp
from river_compile.decoding.passes import Passes, PromptRows
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.decoding.prompt import Prompt
from river_compile.decoding.speculative import Drafting
from river_compile.errors import DecodeError, ExactModeError, OptionError, RiverError, RiverWarning
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, integer, number, one_of, optional, short_repr
from river_compile.kernels.messages import with_id
from river_compile.model_state import model_state
from river_compile.record import record_of
from river_compile.runtime.stats import ExitStats
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.dynamo import OwnCall, current_stance
from river_compile.upstream.transformers import (
    cache_of,
)

CONSTANT = "constant"
# transformers reads these from the assistant's configuration too.
_ASSISTED = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
_CHECKS = {
    "num_assistant_tokens": optional(integer(0)),
    "num_assistant_tokens_schedule": one_of(None, CONSTANT),
    "prompt_lookup_num_tokens": optional(integer(0)),
    "assistant_confidence_threshold": optional(number("it must be a probability from 0 to 1", least=0, most=1)),
    "use_mtp": FLAG,
    "self_speculation": one_of(None, True, False),
    "strict": FLAG,
}


class StaticCaches:
    """What is known of a model and static KV caches."""

    why_not = ""  # the error of a prompt on one, if it ran on a cache that grows


@dataclass(frozen=True)
class Decode:
    """Greedy decoding and sampling with transformers' processors, stopping criteria and streamers.

        model.compile(backend="river")
        model.generate(**inputs, custom_generate=river_compile.decode)

    Each step runs to the depth that the exit rule chooses, without drafts.
    """

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
            passes, logits = mode.run_prompt(call, model_kwargs)
            text = None
            try:
                record.of(PromptRows).add(len(input_ids))
                drafting = mode.drafting(call, passes, logits)
                rows = call.rows(passes.agreement, drafting is not None)
                rows.append_next(logits[:, -1])
                with model._optimize_model_for_decode():
                    ids = generate(passes, rows, drafting)
                # With early exits, some entries of new tokens are the twins'.
                text = ids[:, : passes.kv.filled] if self.depth == WHOLE else input_ids
                passes.write_programs()
                if streamer is not None:
                    streamer.end()
                return call.result(ids, rows.sampler, passes.kv, cache_of(model_kwargs))
            finally:
                passes.release(text, input_ids.shape[1])

    def run_prompt(self, call: Call, kwargs: Mapping[str, Any]) -> tuple[Passes, Tensor]:
        """Return the passes of a call whose prompt has run, and its last logits ``[B, 1, V]``."""
        passes, fits = self.passes(call, kwargs), record_of(call.model.parameters()).of(StaticCaches)
        try:
            return passes, Prompt(passes, call.ids_BS, call.config).run()[:, -1:]
        except BaseException as error:
            passes.release()
            tried = passes.kv.is_full and not call.model._can_compile_fullgraph and isinstance(error, RuntimeError)
            if not tried or isinstance(error, RiverError):
                raise
            fits.why_not = " ".join(str(error).split())[:200]
        # Whether the code of such a model takes a static cache shows only when it runs.
        passes = self.passes(call, kwargs)
        try:
            logits = Prompt(passes, call.ids_BS, call.config).run()[:, -1:]
        except BaseException:
            passes.release()
            fits.why_not = ""  # the cache was not the reason
            raise
        kind = type(call.model).__name__
        message = f"{kind} takes no static KV cache ({fits.why_not}), so it decodes on one that grows, without drafts"
        warnings.warn(with_id("RC064", message), RiverWarning, stacklevel=2)
        return passes, logits

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
        kv, keeps_hidden = KVCache(made), len(ids_BS) == 1 and self.reads_hidden
        # The masks of CPM-Ant and GPT-Neo are for caches that grow, and Moshi's for one that slides.
        fits = model._can_compile_fullgraph or prepares_as_most_do(model)
        if fits and not (needs_own_cache(model) or record.of(StaticCaches).why_not):
            entries = None if state is None else state.of_entries
            known = None if keeps_hidden else ids  # no hidden states are kept of a text that has run
            ours, _ = record.of(PrefixPool).acquire(model, len(ids_BS), tokens, known, entries)
            kv = ours if ours.is_full else kv
        return Passes(model, kwargs, kv, self.depth, state, ids is not None, keeps_hidden)

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
            why_not = self.why_not_assistant(model, given.assistant_model)
            if why_not:
                return f"assistant_model={type(given.assistant_model).__name__} is not available: {why_not}"
        if given.kwargs.get("assistant_tokenizer") is not None:
            return "assistant_tokenizer= is not available, since drafts need the model's own tokens. Remove it"
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

    def drafting(self, call: Call, passes: Passes, logits: Tensor) -> Drafting | None:
        """Return how a call whose prompt ran drafts; raise an ExactModeError if drafts cannot be verified."""
        return None

    def for_call(self, given: Given, strict: bool | None = None) -> Decode:
        """Return the mode with the options of one call."""
        if strict is not None:
            raise OptionError(f"strict={strict} requires custom_generate=exact, got decode. Remove it", id="RC003")
        return self

    @property
    def reads_hidden(self) -> bool:
        """Whether drafts are made of the last hidden states."""
        return False

    def copies(self, config: GenerationConfig) -> bool:
        """Whether the mode does what makes a greedy or sampling config an assisted one."""
        return False

    def why_not_assistant(self, model: PreTrainedModel, assistant: Any) -> str:
        """Return why an assistant cannot draft, and the fix; an empty string if it can."""
        return "quality='fast' verifies no drafts. Remove it, or use quality='exact'"


decode = Decode()


@dataclass(frozen=True)
class ExactMode(Decode):
    """Speculative decoding with the model's own output; a callable for ``generate(custom_generate=...)``.

        model.compile(backend="river")
        model.generate(**inputs, custom_generate=river_compile.exact)
        model.generate(**inputs, custom_generate=river_compile.ExactMode(num_assistant_tokens=7))

    The options have transformers' names. Each can be given to ``generate`` too, for one call.

    Attributes:
        num_assistant_tokens: longest draft in tokens; 0: no drafts. Drafts are verified in passes of 2, 4, 6, 8, 16 ...
            ``num_assistant_tokens + 1`` tokens. None: 15, 63 if the weights of layers are streamed, 5 if several
            processes share the model.
        num_assistant_tokens_schedule: None: measured times decide the length of each draft. "constant": every draft has
            `num_assistant_tokens` tokens, and nothing depends on time.
        prompt_lookup_num_tokens: most tokens that a draft copies from the context. 0: none. None: as many as it has.
        assistant_model: a smaller model with the same tokens, which drafts with all its layers in 4 bits.
        assistant_confidence_threshold: a token of the assistant that is less probable than this ends its draft. None:
            the expected gain decides.
        use_mtp: whether the checkpoint's own layers for multi-token prediction draft. A prompt then runs as a whole.
        self_speculation: whether the model's own twins draft. None: unless `accelerate` got an assistant or `use_mtp`.
        strict: an error if a row of a verifying pass might have other bits than it has without drafts.

    Raises:
        OptionError: (a ``ValueError``) a bad value.
    """

    num_assistant_tokens: int | None = None
    num_assistant_tokens_schedule: str | None = None
    prompt_lookup_num_tokens: int | None = None
    assistant_model: PreTrainedModel | None = None
    assistant_confidence_threshold: float | None = None
    use_mtp: bool = False
    self_speculation: bool | None = None
    strict: bool = False
    refusal: ClassVar[type[DecodeError | ExactModeError]] = ExactModeError
    depth: ClassVar[int | None] = WHOLE

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name), OptionError))

    def for_call(self, given: Given, strict: bool | None = None) -> Decode:
        assistant: Any = given.assistant_model or self.assistant_model
        settings = given.settings(_ASSISTED, None if assistant is None else assistant.generation_config)
        if str(settings.get("num_assistant_tokens_schedule")).startswith("heuristic"):
            del settings["num_assistant_tokens_schedule"]  # as a length by measured times is
        settings |= given.settings(("prompt_lookup_num_tokens", "use_mtp"))
        strict = self.strict if strict is None else strict
        return replace(self, **settings, assistant_model=assistant, strict=strict)

    def why_not_assistant(self, model: PreTrainedModel, assistant: Any) -> str:
        return why_not_assistant(model, assistant)

    def why_no_drafter(self, model: PreTrainedModel) -> str:
        """Return why the assistant or the MTP layers of these options cannot draft, and the fix; empty if they can."""
        if self.assistant_model is not None:
            why_not = why_not_assistant(model, self.assistant_model)
            if why_not:
                return f"assistant_model={type(self.assistant_model).__name__} cannot draft: {why_not}"
        why_not = load_mtp(model) if self.use_mtp else ""
        return f"use_mtp=True is not available: {why_not}" if why_not else ""

    @property
    def reads_hidden(self) -> bool:
        return self.use_mtp and self.num_assistant_tokens != 0

    def copies(self, config: GenerationConfig) -> bool:
        asked = config.prompt_lookup_num_tokens is not None or getattr(config, "use_mtp", None)
        return bool(asked) and config.assistant_early_exit is None

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
        why_not = why_not_mtp(model) if self.use_mtp else ""
        if why_not:
            return f"use_mtp=True is not available: {why_not}"
        return super().obstacle(model, rows, config, synced_gpus, given, model_kwargs)

    def drafting(self, call: Call, passes: Passes, logits: Tensor) -> Drafting | None:
        if self.num_assistant_tokens == 0:
            return None
        allow_drafts(passes, call.ids_BS, logits, self.num_assistant_tokens, self.strict)
        if self.num_assistant_tokens_schedule == CONSTANT or passes.agreement.several:  # no time is the same in all
            length = DraftLength(adaptive=False)
        else:
            assistant = self.assistant_model
            number = 0 if assistant is None else record_of(assistant.parameters()).of(ExitStats).model_id
            known = passes.record.of(DraftLengths)
            length = known.setdefault((call.config.do_sample, number), DraftLength())
        copied = sys.maxsize if self.prompt_lookup_num_tokens is None else self.prompt_lookup_num_tokens
        assert passes.graph is not None, "drafts are allowed"
        length.carry_over(passes.widths, call.ids_BS.shape[1], passes.graph.reads)
        return Drafting(length, copied, tuple(self._drafters(passes)))

    def _drafters(self, passes: Passes) -> Iterator[Drafter]:
        """Yield what drafts for passes whose prompt has run."""
        assert passes.graph is not None, "drafts are allowed"
        if self.assistant_model is not None:
            prepare(self.assistant_model, passes.record, passes.graph.config)
            yield Assistant(self.assistant_model, passes.vocabulary, self.assistant_confidence_threshold)
        if self.use_mtp:
            yield Mtp(passes, mtp_layers(passes.record))
        if passes.graph.config.exit_depth is None and self.self_speculation is not False:
            yield Twins(passes)

    def self_drafts(self, options: Mapping[str, object]) -> bool:
        """Whether the model's twins are to draft, by the options of the backend."""
        if self.self_speculation is not None:
            return self.self_speculation
        others = self.assistant_model is not None or self.use_mtp
        return not others or options.get("twins") is not None


exact = ExactMode()


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
