"""The values of ``model.generate(**inputs, custom_generate=...)``: `decode`, and `exact` with drafts.

`decode` generates what transformers' own loop does, in less time for each step. With `exact` the river drafts, the
backbone verifies, and the text is the plain model's (docs/exact.md): greedy text token for token, sampled text for the
same seed likewise.

Not handled (an error that says so): beams and transformers' own assisted modes, encoder-decoder models, attention
weights and hidden states as outputs, generation that is synchronized over processes; for drafts also models with a
recurrent state.
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

from river_compile.decoding.draft_policy import ByGain, DraftPolicy, FixedLength
from river_compile.decoding.drafter import Drafter
from river_compile.decoding.kept_prefix import prompt_of
from river_compile.decoding.loop import DecodeLoop
from river_compile.decoding.request import Ends, Outputs, Request
from river_compile.decoding.sampling import STATELESS, Chooser, RowProcessors
from river_compile.decoding.sequences import Sequences
from river_compile.decoding.session import LONGEST_OFFLOADED, Session, verification_widths
from river_compile.distributed.ranks import Ranks
from river_compile.errors import DecodeError, ExactModeError, OptionError
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, integer, optional
from river_compile.model_record import record_of
from river_compile.runtime.cache_pool import borrowed_cache
from river_compile.runtime.draft_stats import DraftRates
from river_compile.upstream.transformers import (
    KeepsTokenizer,
    argument_of_generate,
    cache_argument,
    cache_of,
    shares_cache,
)

_ROW_BY_ROW = {MaxLengthCriteria, EosTokenCriteria, StopStringCriteria}

_CHECKS = {
    "max_draft": optional(integer(1)),
    "prompt_lookup": FLAG,
    "strict": FLAG,
    "adaptive": FLAG,
    "static_cache": FLAG,
}

# (The last one is what stands for the result of a call that joined a batch.)
Generated: TypeAlias = Tensor | GenerateDecoderOnlyOutput | object


@dataclass(frozen=True)
class Call:
    """One call of ``generate``, as it is handed to a callable ``custom_generate``."""

    model: PreTrainedModel
    ids_BS: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any | None

    def request(
        self, ranks: Ranks, drafting: bool, together: bool, generator: torch.Generator | None = None
    ) -> Request:
        """Returns the call as a decode loop takes it.

        Args:
            ranks: that share the model.
            drafting: whether drafts are verified.
            together: whether rows keep only what held for all of them.
            generator: of random numbers; None for PyTorch's.
        """
        config, criteria, rows = self.config, self.criteria, len(self.ids_BS)
        wanted, pad_token = config.return_dict_in_generate, self.pad_token
        stateless = LogitsProcessorList(p for p in self.processors if type(p) in STATELESS)
        ends = getattr(config, "_eos_token_tensor", None)
        return Request(
            texts=Sequences(self.ids_BS, pad_token, None if self.streamer is None else self.streamer.put),
            chooser=Chooser(rows, config.do_sample, ranks, drafting, generator),
            process=RowProcessors(self.processors) if self.processors else None,
            process_draft=RowProcessors(stateless) if stateless else None,
            stops=_ends(criteria) or criteria,
            max_length=math.ceil(min(config.max_length, sys.maxsize)),  # (generate takes 17.5 and inf too)
            pad_token=pad_token,
            together=together,
            end_tokens=frozenset(() if ends is None else ends.tolist()),
            scores=Outputs(rows) if wanted and config.output_scores else None,
            logits=Outputs(rows) if wanted and config.output_logits else None,
            ranks=ranks,
        )

    @property
    def pad_token(self) -> int | None:
        """What rows receive that have ended while others go on; None if none can end before the others."""
        ends = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        pad = self.config._pad_token_tensor
        return int(pad) if ends and pad is not None else None

    def result(self, ids_BS: Tensor, request: Request, cache: Cache) -> Generated:
        """Returns the result of ``generate`` for texts that have ended with these ids."""
        if not self.config.return_dict_in_generate:
            return ids_BS
        return GenerateDecoderOnlyOutput(
            sequences=ids_BS,
            scores=None if request.scores is None else tuple(request.scores.steps),
            logits=None if request.logits is None else tuple(request.logits.steps),
            **{cache_argument(self.model): cache},
        )


@dataclass(frozen=True)
class Decode:
    """Greedy decoding and sampling; the callable for ``custom_generate``.

    The same processors, stopping criteria and streamers in the same order with the same arguments as in transformers'
    loop, and the same tokens.

    Attributes:
        static_cache: stand a static cache for one that grows, where the caller says nothing of caches.
    """

    static_cache: bool = False
    __signature__ = KeepsTokenizer()
    refusal: ClassVar[type[Exception]] = DecodeError
    depth: ClassVar[int | None] = None  # of decode steps: by the exit policy
    per_call: ClassVar[tuple[str, ...]] = ()  # options that ``generate`` itself takes too

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
    ) -> Generated:
        """Called by ``generate`` in place of its own loop, with its arguments, `per_call` options among them.

        Raises:
            DecodeError, ExactModeError: (a ``ValueError``) something that this loop does not handle.
            OptionError: (a ``ValueError``) a bad option.
            CacheFullError: (a ``ValueError``) a static cache of the user's is too small for the text.
        """
        config = generation_config
        given = {name: model_kwargs.pop(name, None) for name in self.per_call}
        mode = replace(self, **{name: value for name, value in given.items() if value is not None})
        assistant = argument_of_generate("assistant_model")
        obstacle = mode.obstacle(model, len(input_ids), config, synced_gpus, assistant, model_kwargs)
        if obstacle:
            raise self.refusal(obstacle)
        streamer = streamer or argument_of_generate("streamer")
        if input_ids.dtype == torch.int32:
            input_ids = input_ids.long()  # (new tokens are, and so is what generate returns)
        call = Call(model, input_ids, logits_processor, stopping_criteria, config, streamer)
        shared = shares_cache(config)
        record = record_of(model.parameters())
        joined = None if record.batch is None else record.batch.join(call, mode, model_kwargs, shared)
        if joined is not None:
            return joined
        look = record.look_at(model)
        strict = isinstance(mode, ExactMode) and mode.strict
        prompt = None if shared else prompt_of(model, input_ids, config, model_kwargs, look, strict)
        with (
            borrowed_cache(
                record.cache_pool, model, input_ids, config, model_kwargs, shared, self.static_cache, prompt
            ) as lent,
            torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit + mode.graphs),
        ):
            session = Session(model, lent, self.depth, look)
            with session.told_if_compiled(len(input_ids)):
                logits = session.prefill(input_ids, config)[:, -1:]
            drafter, together = mode.drafting(call, session, logits, shared)
            request = call.request(session.ranks, drafter is not None, together)
            with model._optimize_model_for_decode():
                ids = DecodeLoop(session, drafter, session.ranks).run(request, logits)
            # (Where tokens may leave, some entries of new ones are twins'.)
            lent.keep_text(ids, session.entries.filled if self.depth == WHOLE else input_ids.shape[1])
            record.write_programs()
        if streamer is not None:
            streamer.end()
        return call.result(ids, request, session.cache)

    @property
    def graphs(self) -> int:
        """How many graphs more than plain generation a call needs.

        Beyond its limit of graphs for one function Dynamo would run what is new without the backend: right, and slow.
        """
        return 1  # of a prompt's rest

    def obstacle(
        self,
        model: PreTrainedModel,
        rows: int,
        config: GenerationConfig,
        synced_gpus: bool,
        assistant_model: object,
        model_kwargs: Mapping[str, object],
    ) -> str:
        """Returns the request that the loop does not handle, with the fix; empty if there is none."""
        mode = config.get_generation_mode()
        if assistant_model is not None:
            return f"assistant_model={type(assistant_model).__name__} is not available here; leave it out"
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"these options ask for {mode.value}; leave out num_beams and prompt_lookup_num_tokens"
        if model.config.is_encoder_decoder:
            return f"{type(model).__name__} is an encoder-decoder model; leave out custom_generate"
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name) and config.return_dict_in_generate:
                return f"{name}=True is not available; output_scores and output_logits are"
        if synced_gpus:
            return "synced_gpus=True is not available: processes would run other numbers of passes"
        if cache_of(model_kwargs) is None:
            return "use_cache=False leaves out the KV cache; leave out use_cache=False"
        return _other_rows(rows, model_kwargs)

    def drafting(
        self, call: Call, session: Session, logits: Tensor, shared: bool, joins: bool = False
    ) -> tuple[Drafter | None, bool]:
        """Returns the drafter, after the prompt, and whether rows keep only tokens that held for all of them.

        Args:
            call: whose prompt has run.
            session: in which it did.
            logits: of its last position.
            shared: whether the caller brings or gets back the cache.
            joins: whether rows of other calls follow.

        Raises:
            ExactModeError: drafts cannot be verified.
        """
        return None, True


decode = Decode()


@dataclass(frozen=True)
class ExactMode(Decode):
    """Generates exactly the plain model's text; a callable for ``generate(custom_generate=...)``.

    Every option can also be given to ``generate`` itself, for one call.

    Attributes:
        max_draft: longest draft, in tokens, at least 1. Passes are verified at widths 2, 4, 8 ... max_draft + 1. None
            for 15, and 63 where blocks of the backbone are offloaded, so that a pass brings their weights in for many
            tokens.
        prompt_lookup: copy drafts from the context where it repeats itself.
        strict: an error where a row of a verifying pass might have other bits than it has without drafts.
        adaptive: let measured times decide how long to draft, and let the river draft none where that does not pay.
            Otherwise drafts have `max_draft` tokens, and nothing depends on time.
    """

    max_draft: int | None = None
    prompt_lookup: bool = True
    strict: bool = False
    adaptive: bool = True
    __signature__ = KeepsTokenizer()
    refusal: ClassVar[type[Exception]] = ExactModeError
    depth: ClassVar[int | None] = WHOLE
    per_call: ClassVar[tuple[str, ...]] = ("max_draft", "prompt_lookup", "strict", "adaptive")

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name), OptionError))

    def with_options(self, **options: Any) -> ExactMode:
        """Returns the same mode with other options."""
        return replace(self, **options)

    @property
    def graphs(self) -> int:
        """(A static sliding window has a graph for each width until it is full, and another one afterwards.)"""
        return super().graphs + 2 * len(verification_widths(self.max_draft or LONGEST_OFFLOADED))

    def obstacle(
        self,
        model: PreTrainedModel,
        rows: int,
        config: GenerationConfig,
        synced_gpus: bool,
        assistant_model: object,
        model_kwargs: Mapping[str, object],
    ) -> str:
        if model._is_stateful:
            return (
                f"exact mode takes drafted tokens back, which the recurrent state of {type(model).__name__} cannot; "
                "leave out custom_generate: exits and twins work"
            )
        return super().obstacle(model, rows, config, synced_gpus, assistant_model, model_kwargs)

    def drafting(
        self, call: Call, session: Session, logits: Tensor, shared: bool, joins: bool = False
    ) -> tuple[Drafter | None, bool]:
        session.allow_drafts(call.ids_BS, logits, self.max_draft, self.strict)
        together = not joins and (len(call.ids_BS) == 1 or shared or not (session.can_part and _row_by_row(call)))
        return self._drafter(call, session, together), together

    def _drafter(self, call: Call, session: Session, together: bool) -> Drafter:
        rule: DraftPolicy
        if self.adaptive:
            rule = ByGain(session.times, session.width_for, together)
            rates = session.record.drafts.rates.setdefault(call.config.do_sample, DraftRates()).go_on()
        else:  # (drafts are the same in every run)
            rates = DraftRates()
            rule = FixedLength(session.width_for)
        return Drafter(
            prompt_lookup=self.prompt_lookup,
            rule=rule,
            times=session.times,
            together=together,
            pad_token=call.pad_token or 0,
            ranks=session.ranks,
            rates=rates,
        )


exact = ExactMode()


def _ends(criteria: StoppingCriteriaList) -> Ends | None:
    """Returns the ends that stopping criteria amount to, None if they must be asked."""
    if not criteria or any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in criteria):
        return None
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    tokens = [c.eos_token_id.tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    return Ends(min(lengths, default=sys.maxsize), frozenset(itertools.chain(*tokens)))


def _row_by_row(call: Call) -> bool:
    """Whether processors and criteria are known to look at each row alone, and to remember nothing.

    Without an end token there is no padding: a row that a stop string ended goes on for as long as the others do.
    """
    kinds = {type(criterion) for criterion in call.criteria}
    ends_alone = StopStringCriteria not in kinds or EosTokenCriteria in kinds
    return ends_alone and kinds <= _ROW_BY_ROW and all(type(p) in STATELESS for p in call.processors)


def _other_rows(rows: int, model_kwargs: Mapping[str, object]) -> str:
    """Returns a message if inputs have another number of rows than the ids: the plain model reports the error."""
    for name, fitting in (("attention_mask", (rows,)), ("position_ids", (1, rows))):
        given = model_kwargs.get(name)
        if isinstance(given, Tensor) and given.ndim in (2, 3) and given.shape[-2] not in fitting:
            return f"input_ids have {rows} rows, and {name} {given.shape[-2]}; give one for each text"
    return ""
