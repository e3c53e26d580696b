"""Exact mode, self-speculative decoding: ``model.generate(**inputs, custom_generate=river_compile.exact)``.

The river drafts, the backbone verifies, and the text is the plain model's: greedy text token for token, up to how the
hardware rounds passes of different widths (docs/exact.md), sampled text for the same seed likewise.

Not handled (a ValueError that says so): beams and transformers' own assisted modes, encoder-decoder models, models with
a recurrent state, attention weights and hidden states as outputs, generation that is synchronized over processes.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from river_compile.errors import ExactModeError, OptionError
from river_compile.kept_cache import lent_cache
from river_compile.kernels.checks import FLAG, integer, number, optional
from river_compile.state import state_of_model
from river_compile.upstream.hf_cache import cache_argument, cache_of

from .accept import Chooser
from .draft import Drafter, DraftRates
from .hf_frames import KeepsTokenizer, argument_of_generate, shares_cache
from .loop import Ends, ExactLoop, Outputs
from .pays import pays_of
from .plain import PlainRunner
from .plan import ByChance, ByGain, Rule
from .processors import STATELESS, RowProcessors
from .runner import DraftVerifyRunner, preparations
from .texts import Texts

_ROW_BY_ROW = {MaxLengthCriteria, EosTokenCriteria, StopStringCriteria}

_STOP_BELOW = 0.5  # where measured times may not decide

_CHECKS = {
    "max_draft": optional(integer(1)),
    "prompt_lookup": FLAG,
    "stop_below": optional(number("it must be a number from 0 to 1", least=0, most=1)),
    "strict": FLAG,
    "adaptive": FLAG,
    "static_cache": FLAG,
}


@dataclass(frozen=True)
class ExactMode:
    """Generates exactly the plain model's text; a callable for ``generate(custom_generate=...)``.

    Every option can also be given to ``generate`` itself, for one call.

    Attributes:
        max_draft: longest draft, in tokens, at least 1. Passes are verified at widths 2, 4, 8 ... max_draft + 1, and at
            every width up to that where strict. None for 15, and 63 where blocks of the backbone are offloaded, so that
            a pass brings their weights in for many tokens.
        prompt_lookup: copy drafts from the context where it repeats itself.
        stop_below: the river ends its draft once the draft's estimated chance of holding in whole is below this, in
            [0, 1]; 0 always drafts `max_draft` tokens. None drafts as long as it is expected to pay, by measured times,
            or is 0.5 where not `adaptive`.
        strict: verify in passes whose rows have the very bits of decoding without drafts, also in bfloat16.
        adaptive: let measured times decide how long to draft, and let the river draft none where that does not pay.
            Otherwise nothing depends on time.
        static_cache: stand a static cache for one that grows, where the caller says nothing of caches.
    """

    max_draft: int | None = None
    prompt_lookup: bool = True
    stop_below: float | None = None
    strict: bool = False
    adaptive: bool = True
    static_cache: bool = False
    __signature__ = KeepsTokenizer()

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name), OptionError))

    def with_options(self, **options: Any) -> ExactMode:
        """Returns the same mode with other options."""
        return replace(self, **options)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any | None = None,
        max_draft: int | None = None,
        prompt_lookup: bool | None = None,
        stop_below: float | None = None,
        strict: bool | None = None,
        adaptive: bool | None = None,
        tokenizer: object | None = None,  # of stop_strings; taking it makes generate keep it
        **model_kwargs: object,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by ``generate`` in place of its own loop, with its arguments.

        Raises:
            ExactModeError: (a ``ValueError``) something that exact mode does not handle.
            OptionError: (a ``ValueError``) a bad option.
            CacheFullError: (a ``ValueError``) a static cache of the user's is too small for the text.
        """
        given = {"max_draft": max_draft, "prompt_lookup": prompt_lookup, "stop_below": stop_below, "strict": strict}
        given["adaptive"] = adaptive
        mode = self.with_options(**{name: value for name, value in given.items() if value is not None})
        config = generation_config
        _check(model, config, synced_gpus, argument_of_generate("assistant_model"), model_kwargs)
        _check_rows(input_ids.shape[0], model_kwargs)
        streamer = streamer or argument_of_generate("streamer")
        if input_ids.dtype == torch.int32:
            input_ids = input_ids.long()  # (new tokens are, and so is what generate returns)
        shared = shares_cache(config)
        with lent_cache(model, input_ids, config, model_kwargs, shared, mode.static_cache) as lent:
            runner = DraftVerifyRunner(model, lent, mode.max_draft, mode.strict)
            together = len(input_ids) == 1 or shared
            made = mode._generate(runner, input_ids, logits_processor, stopping_criteria, config, streamer, together)
        if streamer is not None:
            streamer.end()
        return made

    def _generate(
        self,
        runner: DraftVerifyRunner,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any | None,
        together: bool,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        model = runner.model
        # Beyond its limit of graphs for one function Dynamo would run what is new without the backend: exact, and slow.
        # (A static sliding window has a graph for each width until it is full, and another one afterwards.)
        dynamo = torch._dynamo.config
        with dynamo.patch(recompile_limit=dynamo.recompile_limit + 2 * len(runner.widths)):
            passes, first_logits = self.begin(runner, input_ids, config)
            together = together or not (passes.can_part and _row_by_row(processors, criteria))
            loop = self._loop(passes, input_ids, processors, criteria, config, streamer, together)
            if self.adaptive and passes is runner:
                state = state_of_model(model, "exact mode")
                prepared = functools.partial(preparations, state)
                loop.pays_of = functools.partial(pays_of, state, runner.stats.payoff, self.strict, prepared)
                loop.pays = loop.pays_of(input_ids.shape[0])
            with model._optimize_model_for_decode(), passes.sequences.one():
                ids = loop.run(first_logits)
        if not config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=None if loop.scores is None else tuple(loop.scores.steps),
            logits=None if loop.logits is None else tuple(loop.logits.steps),
            **{cache_argument(model): passes.cache},
        )

    def begin(
        self, runner: DraftVerifyRunner, input_ids: Tensor, config: GenerationConfig
    ) -> tuple[DraftVerifyRunner | PlainRunner, Tensor]:
        """Runs the prompt; returns what runs the passes from there on, and the prompt's last logits ``[B, 1, V]``.

        Raises:
            ExactModeError: the prompt showed that drafts cannot be verified.
        """
        return runner, runner.prefill(input_ids, config)

    def _loop(
        self,
        runner: DraftVerifyRunner | PlainRunner,
        ids_BS: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any | None,
        together: bool,
    ) -> ExactLoop:
        """Returns the loop of one call, whose prompt has run."""
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad_token = int(config._pad_token_tensor) if ends and config._pad_token_tensor is not None else None
        end_tokens = getattr(config, "_eos_token_tensor", None)
        stateless = LogitsProcessorList(p for p in processors if type(p) in STATELESS)
        rule: Rule
        if self.stop_below is None and self.adaptive:
            rule = ByGain(runner.times, runner.width_for, together)
            rates = runner.rates.setdefault(config.do_sample, DraftRates()).go_on()
        else:  # (drafts are the same in every run)
            rates = DraftRates()
            rule = ByChance(_STOP_BELOW if self.stop_below is None else self.stop_below, runner.width_for)
        wanted = config.return_dict_in_generate
        return ExactLoop(
            runner=runner,
            drafter=Drafter(
                ids_BS,
                prompt_lookup=self.prompt_lookup,
                rule=rule,
                times=runner.times,
                together=together,
                pad_token=pad_token or 0,
                end_tokens=() if end_tokens is None else end_tokens.tolist(),
                ranks=runner.ranks,
                rates=rates,
            ),
            texts=Texts(ids_BS, pad_token, None if streamer is None else streamer.put),
            chooser=Chooser(len(ids_BS), config.do_sample, runner.ranks),
            process=RowProcessors(processors) if processors else None,
            process_draft=RowProcessors(stateless) if stateless else None,
            stops=_ends(criteria) or criteria,
            max_length=math.ceil(min(config.max_length, sys.maxsize)),  # (generate takes 17.5 and inf too)
            pad_token=pad_token,
            together=together,
            scores=Outputs(len(ids_BS)) if wanted and config.output_scores else None,
            logits=Outputs(len(ids_BS)) if wanted and config.output_logits else None,
            ranks=runner.ranks,
        )


exact = ExactMode()


def _ends(criteria: StoppingCriteriaList) -> Ends | None:
    """Returns what stopping criteria come to, None where they must be asked."""
    if not criteria or any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in criteria):
        return None
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    tokens = [c.eos_token_id.tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    return Ends(min(lengths, default=sys.maxsize), frozenset(itertools.chain(*tokens)))


def _row_by_row(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> bool:
    """Whether processors and criteria are known to look at each row alone, and to remember nothing.

    Without an end token there is no padding: a row that a stop string ended goes on for as long as the others do.
    """
    kinds = {type(criterion) for criterion in criteria}
    ends_alone = StopStringCriteria not in kinds or EosTokenCriteria in kinds
    return ends_alone and kinds <= _ROW_BY_ROW and all(type(p) in STATELESS for p in processors)


def _check_rows(rows: int, model_kwargs: Mapping[str, object]) -> None:
    """Raises an ExactModeError where others than the ids' rows were given: the plain model says what is wrong."""
    for name, fitting in (("attention_mask", (rows,)), ("position_ids", (1, rows))):
        given = model_kwargs.get(name)
        if isinstance(given, Tensor) and given.ndim in (2, 3) and given.shape[-2] not in fitting:
            raise ExactModeError(
                f"input_ids have {rows} rows, and attention_mask or position_ids {given.shape[-2]}; give one for each text"
            )


def _check(
    model: PreTrainedModel,
    config: GenerationConfig,
    synced_gpus: bool,
    assistant_model: object,
    model_kwargs: Mapping[str, object],
) -> None:
    """Raises an ExactModeError for what exact mode does not handle."""
    if assistant_model is not None:
        raise ExactModeError(
            f"assistant_model={type(assistant_model).__name__} is not available in exact mode, where the model's own "
            "river drafts; leave assistant_model out, or custom_generate"
        )
    generation_mode = config.get_generation_mode()
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ExactModeError(
            f"exact mode replaces greedy search and sampling, but these options ask for {generation_mode.value}; "
            "leave out num_beams and prompt_lookup_num_tokens"
        )
    if model.config.is_encoder_decoder:
        raise ExactModeError(f"exact mode works with decoders; {type(model).__name__} is an encoder-decoder model")
    if model._is_stateful:
        raise ExactModeError(
            f"exact mode takes drafted tokens back, which the recurrent state of {type(model).__name__} cannot; "
            "leave out custom_generate: exits and twins work"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name) and config.return_dict_in_generate:
            raise ExactModeError(f"{name}=True is not available in exact mode; output_scores and output_logits are")
    if synced_gpus:
        raise ExactModeError(
            "synced_gpus=True is not available in exact mode: processes would run other numbers of passes"
        )
    if cache_of(model_kwargs) is None:
        raise ExactModeError("exact mode needs a KV cache, which use_cache=False leaves out")
