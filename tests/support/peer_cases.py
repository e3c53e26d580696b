"""The calls that the peer's layer makes: every setting of GenerationConfig and every argument of `generate`.

Each is about one argument and bears its name. `tests/peer/test_calls.py` asserts that none is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from river_compile.upstream.transformers import cache_argument
from tests.support.families import VOCABULARY, prompt
from tests.support.peer import ANY, DRAFTS, FALLBACK, NEW_TOKENS, RAISES, STEPS, Arguments, Case, Streamed
from tests.support.tokenizers import byte_tokenizer

LENGTH = 9  # tokens of a prompt, more than a window has
SOME = [*range(2, VOCABULARY, 3)]  # of the tokens, so that most texts come to one of them
SAMPLED = {"do_sample": True, "top_k": 0}


def text(rows: int = 1, length: int = LENGTH, seed: int = 0) -> Arguments:
    """Returns a prompt; row i of several begins with i padding tokens."""
    ids, mask = prompt(length, rows, seed), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        ids[row, :row] = mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def call(
    name: str,
    does: str = DRAFTS,
    rows: int = 1,
    more: Callable[[PreTrainedModel], Arguments] | None = None,
    plain: Arguments | None = None,
    **settings: Any,
) -> Case:
    """Returns a call with a prompt of some rows and settings; `more` makes arguments that calls must not share."""
    return Case(
        name, lambda model: {**text(rows), **settings, **({} if more is None else more(model))}, does, plain or {}
    )


class Growing(LogitsProcessor):
    """Has a memory: with each call it raises another token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, (self.calls * 7 + int(input_ids[0, -1])) % VOCABULARY] += 1.5
        return scores


class StopsAfter(StoppingCriteria):
    """Ends a row once its new tokens sum up to a number."""

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: Any) -> Tensor:
        return input_ids[:, LENGTH:].sum(-1) > 300


class Stops(StoppingCriteria):
    """Raises in the call's own code."""

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] > LENGTH + 4:
            raise LookupError("enough")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def allowed(row: int, ids: Tensor) -> list[int]:
    return [token for token in range(VOCABULARY) if (token + int(ids[-1]) + row) % 3]


def embedded(model: PreTrainedModel, with_ids: bool = False) -> Arguments:
    given = text()
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    ids = {"input_ids": given["input_ids"]} if with_ids else {}
    return {"inputs_embeds": embeds, "attention_mask": given["attention_mask"], **ids}


def own_cache(model: PreTrainedModel, static: bool) -> Arguments:
    """A cache that the caller gives, with the prompt's first tokens in it."""
    config, given = model.config.get_text_config(decoder=True), text()
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    name = cache_argument(model)
    with torch.no_grad():
        model.forward(input_ids=given["input_ids"][:, :5], use_cache=True, **{name: cache})
    return {name: cache}


def positions(shift: int) -> Arguments:
    return {"position_ids": torch.arange(LENGTH)[None] + shift}


LENGTHS = [
    call("max_new_tokens", max_new_tokens=17),
    call("max_new_tokens of one", STEPS, max_new_tokens=1),
    call("max_length", max_new_tokens=None, max_length=LENGTH + 7),
    call("max_length that the prompt has", RAISES, max_new_tokens=None, max_length=LENGTH),
    call("min_length", min_length=LENGTH + 6, eos_token_id=SOME, pad_token_id=0),
    call("min_new_tokens", min_new_tokens=5, eos_token_id=SOME, pad_token_id=0),
    call("max_time", max_time=1000.0),
    call("max_time that is over", ANY, max_time=0.0),
    call("stop_strings", ANY, more=lambda _: {"stop_strings": [*"aeiou345ABC"], "tokenizer": byte_tokenizer()}),
    call("stop_strings of a batch", STEPS, 2, lambda _: {"stop_strings": ["a", "7"], "tokenizer": byte_tokenizer()}),
    call("stop_strings without a tokenizer", RAISES, stop_strings=["a"]),
    call("eos_token_id", ANY, eos_token_id=SOME, pad_token_id=0),
    call("eos_token_id of one", ANY, eos_token_id=7, pad_token_id=0),
    call("eos_token_id of a batch", ANY, 2, eos_token_id=SOME, pad_token_id=5),
    call("eos_token_id without padding", ANY, 2, eos_token_id=SOME, pad_token_id=None),
    call("bos_token_id", bos_token_id=3),
    call("decoder_start_token_id", decoder_start_token_id=3),
]

STRATEGIES = [
    call("do_sample", **SAMPLED),
    call("do_sample of a batch", STEPS, 2, **SAMPLED),
    call("num_return_sequences", STEPS, num_return_sequences=2, **SAMPLED),
    call("num_return_sequences of a batch", STEPS, 2, num_return_sequences=2, **SAMPLED),
    call("num_return_sequences, greedy", RAISES, num_return_sequences=2),
    call("num_beams", FALLBACK, num_beams=3),
    call("num_beams, sampled", FALLBACK, num_beams=2, do_sample=True),
    call("early_stopping", FALLBACK, 2, num_beams=2, early_stopping=True, eos_token_id=SOME, num_return_sequences=2),
    call("length_penalty", FALLBACK, num_beams=2, length_penalty=2.0, eos_token_id=SOME),
    call("diversity_penalty", RAISES, num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    call("num_beam_groups", RAISES, num_beams=4, num_beam_groups=2),
    call("constraints", RAISES, num_beams=2, constraints=[[5, 6]]),
    call("force_words_ids", RAISES, num_beams=2, force_words_ids=[[5]]),
    call("penalty_alpha", RAISES, penalty_alpha=0.6, top_k=4),
    call("dola_layers", RAISES, dola_layers="low"),
    call("low_memory", low_memory=True),
    call("use_mtp", use_mtp=False),
    call("synced_gpus", more=lambda _: {"synced_gpus": False}),
    call("is_assistant", ANY, is_assistant=False),
]

SCORES = [
    call("temperature", temperature=0.7, **SAMPLED),
    call("temperature of nothing", RAISES, temperature=0.0, **SAMPLED),
    call("top_k", do_sample=True, top_k=5),
    call("top_p", top_p=0.7, **SAMPLED),
    call("min_p", min_p=0.05, **SAMPLED),
    call("top_h", top_h=0.5, **SAMPLED),
    call("typical_p", typical_p=0.8, **SAMPLED),
    call("epsilon_cutoff", epsilon_cutoff=0.005, **SAMPLED),
    call("eta_cutoff", eta_cutoff=0.01, **SAMPLED),
    call("repetition_penalty", repetition_penalty=1.4),
    call("repetition_penalty of a batch", STEPS, 2, repetition_penalty=1.4),
    call("encoder_repetition_penalty", encoder_repetition_penalty=1.5),
    call("no_repeat_ngram_size", no_repeat_ngram_size=2),
    call("encoder_no_repeat_ngram_size", encoder_no_repeat_ngram_size=1),
    call("bad_words_ids", bad_words_ids=[[4], [5, 6], *([token] for token in SOME[::2])]),
    call("renormalize_logits", renormalize_logits=True, temperature=0.5, **SAMPLED),
    call("forced_bos_token_id", forced_bos_token_id=9),
    call("forced_eos_token_id", forced_eos_token_id=11),
    call("remove_invalid_values", remove_invalid_values=True),
    call("exponential_decay_length_penalty", ANY, exponential_decay_length_penalty=(3, 1.7), eos_token_id=7),
    call("suppress_tokens", suppress_tokens=SOME),
    call("begin_suppress_tokens", begin_suppress_tokens=SOME),
    call("sequence_bias", sequence_bias=[[[7], 2.0], [[7, 8], 4.0], [[9], -8.0]]),
    call("guidance_scale", guidance_scale=1.7),
    call(
        "negative_prompt_ids",
        guidance_scale=1.7,
        more=lambda _: {"negative_prompt_ids": prompt(4, seed=3), "negative_prompt_attention_mask": torch.ones(1, 4)},
    ),
    call("watermarking_config", more=lambda _: {"watermarking_config": WatermarkingConfig(bias=2.0)}),
    call(
        "watermarking_config of SynthID",
        more=lambda _: {
            "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3),
            **SAMPLED,
        },
    ),
    call("token_healing", ANY, more=lambda _: {"token_healing": True, "tokenizer": byte_tokenizer()}),
    call("logits_processor", more=lambda _: {"logits_processor": LogitsProcessorList([Growing()])}),
    call("logits_processor of a batch", STEPS, 2, lambda _: {"logits_processor": LogitsProcessorList([Growing()])}),
    call("stopping_criteria", ANY, more=lambda _: {"stopping_criteria": StoppingCriteriaList([StopsAfter()])}),
    call("stopping_criteria that raise", RAISES, more=lambda _: {"stopping_criteria": StoppingCriteriaList([Stops()])}),
    call("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn=allowed),
    call("prefix_allowed_tokens_fn of a batch", STEPS, 2, prefix_allowed_tokens_fn=allowed),
    call("prefix_allowed_tokens_fn that allows none", RAISES, prefix_allowed_tokens_fn=lambda row, ids: []),
]

CACHES = [
    call("use_cache", FALLBACK, use_cache=False),
    call("cache_implementation", cache_implementation="static"),
    call("cache_implementation of a batch", STEPS, 2, cache_implementation="static"),
    call("cache_implementation, dynamic", FALLBACK, cache_implementation="dynamic"),
    call("cache_implementation, offloaded", ANY, cache_implementation="offloaded"),
    call("cache_implementation, unknown", RAISES, cache_implementation="of another kind"),
    call("cache_config", RAISES, cache_implementation="quantized", cache_config={"backend": "none"}),
    call("max_cache_len", cache_implementation="static", max_cache_len=64),
    call("past_key_values", FALLBACK, more=lambda model: own_cache(model, static=False)),
    call("past_key_values, static", FALLBACK, more=lambda model: own_cache(model, static=True)),
    call("prefill_chunk_size", ANY, prefill_chunk_size=4),
    call("compile_config", more=lambda _: {"compile_config": CompileConfig()}),
    call("disable_compile", disable_compile=False),
    call("continuous_batching_config", continuous_batching_config=None),
]

ASSISTANTS = [
    call("num_assistant_tokens", num_assistant_tokens=5),
    call("num_assistant_tokens of one", num_assistant_tokens=1),
    call("num_assistant_tokens of none", STEPS, num_assistant_tokens=0),
    call("num_assistant_tokens_schedule", num_assistant_tokens_schedule="constant"),
    call("num_assistant_tokens_schedule by measured times", ANY, num_assistant_tokens_schedule="heuristic"),
    call("assistant_confidence_threshold", assistant_confidence_threshold=0.2),
    call("assistant_lookbehind", assistant_lookbehind=3),
    call("target_lookbehind", target_lookbehind=3),
    call("assistant_ensemble_weight", assistant_ensemble_weight=None),
    call("speculation_type", speculation_type=None),
    call("prompt_lookup_num_tokens", prompt_lookup_num_tokens=3),
    call("prompt_lookup_num_tokens of none", prompt_lookup_num_tokens=0, plain={"prompt_lookup_num_tokens": None}),
    call(
        "prompt_lookup_num_tokens, sampled",
        prompt_lookup_num_tokens=3,
        plain={"prompt_lookup_num_tokens": None},
        **SAMPLED,
    ),
    call("max_matching_ngram_size", prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    call("assistant_early_exit", FALLBACK, assistant_early_exit=1),
    call("assistant_early_exit, sampled", FALLBACK, assistant_early_exit=1, **SAMPLED),
    call("assistant_model", more=lambda model: {"assistant_model": type(model)(model.config).eval()}),
]

OUTPUTS = [
    call("return_dict_in_generate", return_dict_in_generate=True, output_scores=False, output_logits=False),
    call("return_dict_in_generate of a batch", STEPS, 2, return_dict_in_generate=True),
    call("output_scores", output_scores=True, output_logits=False),
    call("output_logits", output_scores=False, output_logits=True),
    call("output_attentions", FALLBACK, return_dict_in_generate=False, output_attentions=True),
    call("output_attentions of fields", FALLBACK, return_dict_in_generate=True, output_attentions=True),
    call("output_hidden_states", FALLBACK, return_dict_in_generate=False, output_hidden_states=True),
    call("output_hidden_states of fields", FALLBACK, return_dict_in_generate=True, output_hidden_states=True),
    call("streamer", more=lambda _: {"streamer": Streamed()}),
    call("streamer, sampled", more=lambda _: {"streamer": Streamed(), **SAMPLED}),
    call("streamer of a fallback", RAISES, more=lambda _: {"streamer": Streamed(), "num_beams": 2}),
]


def only(name: str, make: Callable[[PreTrainedModel], Arguments], does: str = DRAFTS) -> Case:
    return Case(name, make, does)


INPUTS = [
    call("greedy"),
    call("batch", STEPS, 2),
    only("inputs", lambda _: {"inputs": text()["input_ids"]}),
    only("no attention_mask", lambda _: {"input_ids": text()["input_ids"]}),
    only("no prompt", lambda _: {"bos_token_id": 3}),
    only("a padded row", lambda _: {name: value[2:] for name, value in text(3).items()}),
    only("bool attention_mask", lambda _: {**text(), "attention_mask": text()["attention_mask"].bool()}),
    only("int32 ids", lambda _: {**text(), "input_ids": text()["input_ids"].int()}),
    only("one token", lambda _: text(length=1)),
    only("a long prompt", lambda _: text(length=40)),
    only("another prompt", lambda _: text(seed=5)),
    only(
        "the start of the prompt and more", lambda _: {"input_ids": torch.cat([prompt(LENGTH), prompt(4, seed=8)], 1)}
    ),
    only(
        "prompts with holes", lambda _: {**text(), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1]])}, ANY
    ),
    only("inputs_embeds", embedded),
    only("inputs_embeds and ids", lambda model: embedded(model, with_ids=True)),
    call("position_ids", more=lambda _: positions(0)),
    call("position_ids that begin later", more=lambda _: positions(4)),
    call("logits_to_keep", ANY, more=lambda _: {"logits_to_keep": 1}),
    only("an id that the vocabulary lacks", lambda _: {"input_ids": torch.tensor([[5, VOCABULARY + 3]])}, RAISES),
    call("an argument that nobody knows", RAISES, more=lambda _: {"color": "red"}),
    only(
        "a mask of another length", lambda _: {**text(), "attention_mask": torch.ones(1, 4, dtype=torch.long)}, RAISES
    ),
    call("generation_config", max_new_tokens=NEW_TOKENS),
]

CASES: dict[str, Case] = {
    case.name: case for cases in (LENGTHS, STRATEGIES, SCORES, CACHES, ASSISTANTS, OUTPUTS, INPUTS) for case in cases
}
