"""`decode` and `exact`, the values of ``model.generate(**inputs, custom_generate=...)``.

Not handled (an error that says so): beams and transformers' assisted modes, encoder-decoder models, attention weights
and hidden states as outputs, generation that is synchronized over processes; with drafts, recurrent states.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from river_compile.decoding.admission import allow_drafts
from river_compile.decoding.batch import generate
from river_compile.decoding.begin import passes_for, run_prompt
from river_compile.decoding.call import Call, Generated
from river_compile.decoding.draft_length import DraftLength, DraftLengths
from river_compile.decoding.given import Given
from river_compile.decoding.joining import OpenBatch, alone
from river_compile.decoding.kv_cache import why_no_rewind
from river_compile.decoding.passes import Passes, PromptRows
from river_compile.decoding.refusals import Request, why_refused
from river_compile.decoding.sources import sources_of, why_no_source
from river_compile.decoding.speculative import Drafting
from river_compile.errors import DecodeError, ExactModeError, OptionError
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, integer, number, one_of, optional
from river_compile.record import record_of
from river_compile.runtime.stats import ExitStats
from river_compile.upstream.transformers import cache_of

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
        obstacle = mode.obstacle(Request(model, len(input_ids), config, synced_gpus, given, model_kwargs))
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
            passes, logits = run_prompt(call, lambda call: mode.passes(call, model_kwargs))
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

    def passes(self, call: Call, kwargs: Mapping[str, Any]) -> Passes:
        """Return the passes on a KV cache that may hold a prefix of the prompt."""
        ids = call.prefix_ids(kwargs, isinstance(self, ExactMode) and self.strict)
        embeds = kwargs.get("inputs_embeds")  # in place of ids, or of ids before them
        tokens = max(given.shape[1] for given in (call.ids_BS, embeds) if given is not None)
        rows = len(call.ids_BS)
        keeps_hidden = rows == 1 and self.reads_hidden
        return passes_for(call.model, kwargs, rows, tokens, ids, self.depth, keeps_hidden=keeps_hidden)

    def obstacle(self, request: Request) -> str:
        """Return an unsupported request and its fix, or an empty string."""
        assistant = request.given.assistant_model
        if assistant is not None:
            why_not = "quality='fast' verifies no drafts. Remove it, or use quality='exact'"
            return f"assistant_model={type(assistant).__name__} is not available: {why_not}"
        return why_refused(request, drafts=False)

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

    @property
    def reads_hidden(self) -> bool:
        return self.use_mtp and self.num_assistant_tokens != 0

    def _copies(self, config: GenerationConfig) -> bool:
        """Whether the mode does what makes a greedy or sampling config an assisted one."""
        asked = config.prompt_lookup_num_tokens is not None or getattr(config, "use_mtp", None)
        return bool(asked) and config.assistant_early_exit is None

    def obstacle(self, request: Request) -> str:
        if request.model._is_stateful:  # refused before its prompt runs; other reasons are of the cache that it makes
            return f"{why_no_rewind(request.model)}. Use quality='fast', whose output changes"
        why_not = why_no_source(request.model, self.assistant_model, self.use_mtp)
        return why_not or why_refused(request, drafts=self._copies(request.config))

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
        assistant, least_probability = self.assistant_model, self.assistant_confidence_threshold
        twins = self.self_speculation is not False
        sources = sources_of(passes, assistant, least_probability, self.use_mtp, twins)
        return Drafting(length, copied, tuple(sources))

    def self_drafts(self, options: Mapping[str, object]) -> bool:
        """Whether the model's twins are to draft, by the options of the backend."""
        if self.self_speculation is not None:
            return self.self_speculation
        others = self.assistant_model is not None or self.use_mtp
        return not others or options.get("twins") is not None


exact = ExactMode()
