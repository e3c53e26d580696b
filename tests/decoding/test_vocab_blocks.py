"""Drafts from a part of the vocabulary: which part, what the twins' head then computes, and that the text stays."""

import functools
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import river_compile
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.decoding.vocab_blocks import VocabBlocks
from river_compile.kernels.ops import MASKED_LOGIT, VOCAB_BLOCK
from tests.support.decoding import passes_on

VOCABULARY = 10_010  # (of a length that no block divides)
OPTIONS = {"kernels": "native", "quantizer": "rtn", "group_size": 32, "first_exit": 1}


def model_of(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.5, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def compiled(**options) -> LlamaForCausalLM:
    model = model_of()
    model.compile(backend=river, options={**OPTIONS, **options})
    return model


@pytest.fixture(scope="module")
def model_with():
    """Returns the one compiled model of each head."""
    return functools.cache(lambda head: compiled(lm_head=head))


def wanted_by(tokens: VocabBlocks, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.isin(torch.arange(vocabulary) // VOCAB_BLOCK, tokens.numbers)


class TestWhichTokens:
    @pytest.mark.parametrize(
        ("vocabulary", "first"), [(100, 100), (8_192, 8_192), (49_152, 12_288), (151_936, 32_768), (262_144, 32_768)]
    )
    def test_a_quarter_or_as_many_as_pay(self, vocabulary, first):
        wanted = wanted_by(VocabBlocks(vocabulary), vocabulary)
        assert wanted[:first].all()
        assert not wanted[first:].any()

    def test_what_was_seen_and_its_neighbors(self):
        tokens = VocabBlocks(VOCABULARY)
        before = tokens.numbers
        tokens.add(torch.tensor([[3, 5], [7, 7]]))
        assert tokens.numbers is before  # so nothing is written again
        tokens.add(torch.tensor([[3, 9_000], [VOCABULARY - 1, 7]]))
        new = wanted_by(tokens) & (torch.arange(VOCABULARY) >= 2512)
        expected = [*range(8_992, 9_008), *range(10_000, VOCABULARY)]
        assert new.nonzero().flatten().tolist() == expected

    def test_ids_that_are_no_tokens_or_lie_elsewhere_do_no_harm(self):
        tokens = VocabBlocks(VOCABULARY)
        before = tokens.numbers
        tokens.add(torch.empty(1, 3, dtype=torch.long, device="meta"))
        assert tokens.numbers is before
        tokens.add(torch.tensor([-200, VOCABULARY + 1_000]))
        assert tokens.numbers[:-1].tolist() == before.tolist()


@torch.no_grad()
def steps(model, depth: int, tokens: VocabBlocks | None, count: int = 3) -> torch.Tensor:
    """Returns the logits of steps that leave at a depth."""
    ids = torch.arange(6)[None]
    passes, logits = passes_on(model, ids), []
    for token in range(count + 1):
        ids = torch.cat([ids, torch.tensor([[max(token - 1, 0)]])], 1)
        logits.append(passes.step(ids, 1, depth, tokens))
        if token == 0:  # (this one went through the model)
            passes.rewind(1)
            ids = ids[:, :-1]
    return torch.cat(logits[1:])


def test_wanted_logits_are_those_of_all_and_the_backbone_gives_all():
    """The largest, those that are recomputed, have the bits of a whole head's."""
    model, tokens = compiled(), VocabBlocks(VOCABULARY)
    tokens.add(torch.tensor([9_999]))
    wanted = wanted_by(tokens)
    whole = steps(model, 0, None)
    some = steps(model, 0, tokens)
    assert (some[..., ~wanted] == MASKED_LOGIT).all()
    best = some.topk(16, dim=-1)
    assert torch.equal(best.values, whole.gather(-1, best.indices))
    assert torch.equal(steps(model, 0, None), whole)
    assert torch.equal(steps(model, 2, tokens), steps(model, 2, None))


def test_threads_want_their_own_logits(model_with):
    """One thread drafts while another takes whole logits from the same model: both get what they get alone."""
    model, tokens = model_with("w4"), VocabBlocks(VOCABULARY)
    alone = {None: steps(model, 0, None), tokens: steps(model, 0, tokens)}
    wrong = []

    def run(what: VocabBlocks | None) -> None:
        for _ in range(20):
            if not torch.equal(steps(model, 0, what), alone[what]):
                wrong.append(what)

    threads = [threading.Thread(target=run, args=(what,)) for what in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.slow
def test_the_text_is_plains_whatever_drafts_lack(sample):
    """Texts of a random model are full of tokens that no draft may have; drafts take up what was seen."""
    model, plain = compiled(), model_of()
    ids = torch.tensor([[1, 9_500, 4, 6_000, 2, 9_500]])
    arguments = {"max_new_tokens": 20, "do_sample": sample, "attention_mask": (ids > 0).long(), "pad_token_id": 0}
    torch.manual_seed(1)
    expected = plain.generate(ids, cache_implementation="static", disable_compile=True, **arguments)
    torch.manual_seed(1)
    with river_compile.trace() as seen:
        text = model.generate(ids, custom_generate=exact, cache_implementation="static", **arguments)
    assert torch.equal(text, expected)
    assert (expected[:, 6:] >= VOCABULARY // 4).any()
    assert seen.cycles


def test_a_list_is_made_anew_only_where_a_token_is():
    """States compare it by identity before they write theirs."""
    tokens = VocabBlocks(VOCABULARY)
    first = tokens.numbers
    assert tokens.numbers is first
    tokens.add(torch.tensor([VOCABULARY - 1]))
    assert len(tokens.numbers) == len(first) + 1
