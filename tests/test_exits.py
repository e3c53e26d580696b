"""Exit criteria: what each one looks at, and what is remembered of a sequence."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from river_compile import RiverConfig, report, trace
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.errors import OptionError
from river_compile.exits import CRITERIA, forced_threshold
from river_compile.kernels.portable import largest_entropy
from tests.support.decoding import cache_argument, new_cache, run_plainly
from tests.support.examples import examples
from tests.support.families import COMMON, make, prompt
from tests.support.lowerings import OPERATORS

LAYERS = 3
OPTIONS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1}
STEPS = 6


def compiled(name="llama", **options):
    model = make(name, layers=LAYERS)
    model.compile(backend=river, options={**OPTIONS, **options})
    return model


@pytest.fixture(scope="module")
def unbounded():
    """A model whose bound lets every token leave, for tests that force another one."""
    return compiled(criterion="confidence", threshold=math.inf)


def entropy(logits):
    """The entropy of the last position's distribution in float64, largest over rows, by its definition."""
    p = logits[:, -1].double().softmax(-1)
    return torch.special.entr(p).sum(-1).max().item()


class TestOptions:
    @pytest.mark.parametrize("name", list(CRITERIA))
    def test_no_threshold_means_the_criterions_own(self, name):
        config = RiverConfig(criterion=name)
        assert config.threshold == CRITERIA[name].threshold
        assert RiverConfig(criterion=name, threshold=0.25).threshold == 0.25

    def test_the_extremes_are_allowed(self):
        assert RiverConfig(criterion="confidence", threshold=math.inf, first_exit=0).first_exit == 0
        assert RiverConfig(criterion="confidence", threshold=0).threshold == 0

    def test_a_model_without_logits_is_refused(self):
        """The base model returns hidden states, whose entropy would mean nothing."""
        model = transformers.LlamaModel(transformers.LlamaConfig(**COMMON, num_hidden_layers=2)).eval()
        model.compile(backend=river, options={**OPTIONS, "criterion": "confidence"})
        with pytest.raises(OptionError, match="criterion='confidence' reads the logits, and this model returns none"):
            decode_by_hand(model, "dynamic", 1)


@torch.no_grad()
def decode_by_hand(model, kind, steps, ids=None, cache=None, plain_prompt=False, plain=False):
    """Runs a prompt and `steps` fixed tokens with one row; returns the last position's logits of each pass.

    The prompt, or all of it, runs as if the model was not compiled where that is asked for.
    """
    cache = cache or new_cache(model, kind)
    run = model.forward if plain else model
    run_prompt = functools.partial(run_plainly, model) if plain_prompt else run
    held = {"use_cache": True, cache_argument(model): cache}
    ids = prompt(5) if ids is None else ids
    passes = [run_prompt(input_ids=ids, **held)]
    for i in range(steps):
        passes.append(run(input_ids=prompt(steps, seed=3)[:, i : i + 1], **held))
    return [out.logits for out in passes]


def cosines_of_plain_blocks(steps):
    """Returns for each decode step the cosine of input and output of every block but the last, in float64."""
    plain, found = make("llama", layers=LAYERS), []
    for layer in plain.model.layers[:-1]:
        layer.register_forward_hook(
            lambda _, args, out: found.append(torch.cosine_similarity(args[0].double(), out.double(), dim=-1).min())
        )
    decode_by_hand(plain, "static", steps)
    each = LAYERS - 1
    return [[c.item() for c in found[i : i + each]] for i in range(each, len(found), each)]  # (the prompt comes first)


class TestEntropy:
    @given(
        st.lists(st.lists(st.floats(-60, 60), min_size=5, max_size=5), min_size=1, max_size=3),
        st.integers(0, 4),
    )
    @examples(50)
    def test_is_that_of_the_least_sure_row(self, rows, impossible):
        """Compared with the definition in float64; a token that cannot come (-inf) adds nothing."""
        logits = torch.tensor(rows)[:, None]
        logits[:, :, :impossible] = -torch.inf
        p = logits[:, -1].double().softmax(-1)
        expected = torch.special.entr(p).sum(-1).max()
        assert largest_entropy(logits).item() == pytest.approx(expected.item(), abs=1e-4)

    def test_looks_at_the_last_position_alone(self):
        logits = torch.zeros(1, 2, 8)
        logits[0, 1, 3] = 50.0
        assert largest_entropy(logits).item() == pytest.approx(0, abs=1e-6)
        assert largest_entropy(logits.flip(1)).item() == pytest.approx(math.log(8), abs=1e-6)

    def test_nan_leaves_nothing_to_trust(self):
        logits = torch.zeros(2, 1, 8)
        logits[1, 0, 0] = torch.nan
        assert math.isnan(largest_entropy(logits).item())
        assert not any(math.nan > criterion.score_threshold(criterion.always) for criterion in CRITERIA.values())


class TestConfidence:
    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_the_previous_logits_decide(self, kind, unbounded):
        """A token leaves where the entropy of the logits before it is below the bound, the prompt's included."""
        model = unbounded
        with trace() as seen:
            before = decode_by_hand(model, kind, STEPS)[:-1]
        assert [t.entropy for t in seen.tokens] == pytest.approx([entropy(x) for x in before], abs=1e-4)
        bound = sorted(t.entropy for t in seen.tokens)[STEPS // 2]
        with trace() as seen, forced_threshold(bound, first_exit=1):
            decode_by_hand(model, kind, STEPS)
        assert {t.depth for t in seen.tokens} == {1, LAYERS}
        assert all((t.depth == 1) == (t.entropy < bound) for t in seen.tokens)

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_sequences_do_not_mix(self, kind, unbounded):
        """Two sequences decoded in turns see the entropies that each sees alone; a new prompt starts from nothing."""
        model = unbounded
        prompts = [prompt(5), prompt(7, seed=9)]

        def alone(ids):
            with trace() as seen:
                decode_by_hand(model, kind, 3, ids)
            return [t.entropy for t in seen.tokens]

        expected = [alone(ids) for ids in prompts]
        held = [{"use_cache": True, cache_argument(model): new_cache(model, kind)} for _ in prompts]
        with trace() as seen, torch.no_grad():
            for ids, mine in zip(prompts, held, strict=True):
                model(input_ids=ids, **mine)
            for i in range(3):
                for mine in held:
                    model(input_ids=prompt(3, seed=3)[:, i : i + 1], **mine)
        together = [t.entropy for t in seen.tokens]
        assert [together[0::2], together[1::2]] == expected
        assert expected[0] != expected[1]


class TestSimilarity:
    def test_the_cosine_of_a_blocks_input_and_output_must_exceed_the_threshold(self):
        """Scores are those of the plain model's hidden states; a token leaves at the first that exceeds it."""
        model = compiled(threshold=2.0)
        with trace() as seen:
            decode_by_hand(model, "static", STEPS)
        scores = [step.scores for step in seen.tokens]
        assert scores == [pytest.approx(cosines, abs=1e-5) for cosines in cosines_of_plain_blocks(STEPS)]
        bound = sorted(first for first, *_ in scores)[STEPS // 2]
        with trace() as seen, forced_threshold(bound, first_exit=1):
            decode_by_hand(model, "static", STEPS)
        assert [step.depth == 1 for step in seen.tokens] == [first > bound for first, *_ in scores]
        for step in seen.tokens:
            *before, last = step.scores
            assert max(before, default=bound) <= bound
            assert step.depth == (len(step.scores) if last > bound else LAYERS)


@pytest.mark.parametrize("name", list(CRITERIA))
@pytest.mark.slow
def test_exact_mode_works_with_every_criterion(name):
    """Drafts and verifications force their depths, so the text stays the plain model's, whatever decides elsewhere."""
    model = compiled(criterion=name)
    model.generation_config.eos_token_id = None
    ids = prompt(6)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(
        ids, custom_generate=exact, num_assistant_tokens_schedule="constant", cache_implementation="static", **arguments
    )
    assert torch.equal(ours, make("llama", layers=LAYERS).generate(ids, **arguments))


@pytest.mark.parametrize("name", list(CRITERIA))
def test_generate_works_with_every_criterion(name):
    """Two rows with left padding through generate, at the default threshold: as many steps as tokens."""
    model = compiled(name="llama", criterion=name)
    ids = prompt(6, batch=2)
    with trace() as seen:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, cache_implementation="static")
    assert len(seen.tokens) == 4
    assert report(model).to_dict()["graphs"][-1]["criterion"] == name
