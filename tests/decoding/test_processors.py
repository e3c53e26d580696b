"""Processors that River applies itself: the same scores to the bit as transformers' classes, and only for these."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from river_compile.decoding.processors import BARRED, processed
from river_compile.decoding.sampling import Sampler

VOCABULARY = 40
tokens = st.lists(st.integers(0, VOCABULARY + 5), min_size=1, max_size=4)  # some beyond the vocabulary
lengths = st.integers(0, 8)
CLASSES = {
    MinLengthLogitsProcessor: st.builds(MinLengthLogitsProcessor, lengths, tokens),
    MinNewTokensLengthLogitsProcessor: st.builds(MinNewTokensLengthLogitsProcessor, lengths, lengths, tokens),
    SuppressTokensAtBeginLogitsProcessor: st.builds(SuppressTokensAtBeginLogitsProcessor, tokens, lengths),
    SuppressTokensLogitsProcessor: st.builds(SuppressTokensLogitsProcessor, tokens),
}
any_of_them = st.lists(st.one_of(*CLASSES.values()), min_size=1, max_size=4)


def test_each_class_that_is_applied_by_its_tokens_is_tested():
    assert CLASSES.keys() == BARRED.keys()


@given(any_of_them, st.integers(1, 3), st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_scores_are_transformers_to_the_bit(processors, rows, length, seed, penalized):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=random)
    scores = torch.randn(rows, VOCABULARY, generator=random)
    before = scores.clone()
    if penalized:  # (one whose own code runs, between others)
        processors.insert(len(processors) // 2, RepetitionPenaltyLogitsProcessor(1.3))
    expected = LogitsProcessorList(processors)(ids, before.clone())
    found = processed(processors, ids, scores, range(rows))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(scores, before) or penalized


@pytest.mark.parametrize("length", range(1, 8))
@pytest.mark.parametrize(
    "processor",
    [
        MinLengthLogitsProcessor(4, [3]),
        MinNewTokensLengthLogitsProcessor(2, 2, [3]),
        SuppressTokensAtBeginLogitsProcessor([3], 4),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_the_length_at_which_a_processor_begins_or_ends_is_transformers(processor, length):
    ids, scores = torch.ones(1, length, dtype=torch.long), torch.zeros(1, VOCABULARY)
    assert torch.equal(processed([processor], ids, scores, [0]), processor(ids, scores))


def test_a_subclass_runs_its_own_code():
    class Own(MinLengthLogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + 1

    scores = torch.zeros(1, VOCABULARY)
    assert processed([Own(5, 3)], torch.ones(1, 2, dtype=torch.long), scores, [0]).tolist() == (scores + 1).tolist()


@given(any_of_them, st.integers(1, 3), st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_the_best_token_is_that_of_transformers_scores(processors, rows, length, seed, drafting):
    """Few values, so that barred tokens are among the best; bfloat16, as models have."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=random)
    logits = torch.randint(4, (rows, VOCABULARY), generator=random).bfloat16()
    expected = LogitsProcessorList(processors)(ids, logits.float()).argmax(-1)
    sampler = Sampler(rows, do_sample=False, processors=processors, drafting=drafting)
    assert torch.equal(sampler.choose(logits, ids, range(rows), 0), expected)
    assert sampler.draft(logits[:1], ids[:1], 0, 0)[0, 0] == expected[0]
