"""Every argument of `generate` on an accelerated model gives what transformers gives: text, fields, cache, errors.

Each test makes two calls of the pair that its family's tests share. The first one returns a dict of fields. The second
one is another line of the table: it returns ids, and its settings are in a GenerationConfig. So each call comes twice,
in both ways, and after different ones. Llama takes every call by default, other families a few.
"""

import inspect

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

import river_compile
from tests.peer.conftest import DRAFTING, pair
from tests.support.families import CONFIGS, MORE_CONFIGS, REFUSED, make
from tests.support.peer import Peers, shuffled
from tests.support.peer_cases import ASSISTANTS, CACHES, CASES, INPUTS, STRATEGIES
from tools.families.tiny import tiny_model

FAMILIES = (*CONFIGS, *MORE_CONFIGS)
QUICK = ("gemma3", "mixtral")  # windows and four norms, experts
FEW = ("greedy", "do_sample", "repetition_penalty", "streamer", "eos_token_id", "num_beams", "position_ids")
AFTER = {**shuffled(FEW), **shuffled([name for name in CASES if name not in FEW])}
DRAWN = ("greedy", "do_sample", "another prompt", "a long prompt", "temperature", "no_repeat_ngram_size")


def quick(family: str, name: str) -> bool:
    return family == "llama" or (family in QUICK and name in FEW)


TABLE = [
    pytest.param(family, name, marks=() if quick(family, name) else pytest.mark.slow, id=f"{family}-{name}")
    for family in FAMILIES
    for name in (FEW if family in REFUSED else CASES)  # (Inductor compiles a refused one's graphs, for minutes)
]
BY_FAMILY = [pytest.param(family, marks=() if family == "llama" else pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize("family", BY_FAMILY)
def test_drafts_are_accepted_and_rejected(family, peers):
    """Otherwise the comparisons would say little about either."""
    models = peers(family)
    before = models.drafted, models.accepted
    for name in DRAWN:
        models.compare(CASES[name])
    drafted, accepted = models.drafted - before[0], models.accepted - before[1]
    assert 0 < accepted < drafted if models.compiles else drafted == 0


def test_early_exit_as_an_assistant_leaves_the_model_as_it_was(peers):
    """transformers shortens the model's configuration for its drafts, and calls its `generate` inside of `generate`."""
    models = peers("llama")
    layers = models.ours.config.num_hidden_layers
    for name in ("greedy", "assistant_early_exit", "another prompt", "assistant_early_exit, sampled", "greedy"):
        models.compare(CASES[name])
        assert models.ours.config.num_hidden_layers == layers


def test_calls_that_dynamo_must_not_trace_are_transformers_own(peers):
    models = peers("llama")
    models.compare(CASES["greedy"])
    models.compiles = False
    with torch.compiler.set_stance("force_eager"):
        models.compare(CASES["greedy"])
        models.compare(CASES["a long prompt"])
    models.compiles = True
    models.compare(CASES["do_sample"])


def test_outputs_that_nobody_gets_compile_nothing(peers):
    """Without a dict attention weights are not returned; the forward that is asked for them has separate graphs."""
    models = peers("llama")
    models.compare(CASES["greedy"])
    graphs = len(river_compile.report(models.ours).graphs)
    models.compare(CASES["output_attentions"])
    assert len(river_compile.report(models.ours).graphs) == graphs


@pytest.mark.parametrize(("family", "name"), TABLE)
def test_a_call_and_another_one_after_it_are_transformers_own(family, name, peers):
    models = peers(family)
    models.compare(CASES[name])
    models.compare(CASES[AFTER[name]], fields=False, config=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for group in (STRATEGIES, CACHES, ASSISTANTS, INPUTS) for case in group])
def test_a_models_first_call_is_transformers_own(name):
    """Whatever is traced for it: later calls find graphs that others left."""
    models = pair("llama")
    models.compare(CASES[name])
    models.compare(CASES["greedy"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_native_kernels_give_the_same(name, native):
    """In float32, by River's own kernels, which round otherwise than the model's operators."""
    native.compare(CASES[name])
    native.compare(CASES[AFTER[name]], fields=False, config=True)


@pytest.fixture(scope="module")
def native() -> Peers:
    return pair("llama", kernels="auto")


def test_the_table_has_every_argument():
    """Of GenerationConfig and of `generate`, but the one that replaces its loop."""
    model, given = make("llama", layers=1), set()
    for case in CASES.values():
        given |= case.make(model).keys()
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    arguments = {*inspect.signature(GenerationMixin.generate).parameters} - {"self", "custom_generate", "kwargs"}
    by_every_second_call = {"generation_config", "output_scores", "output_logits", "return_dict_in_generate"}
    assert not (settings | arguments) - given - by_every_second_call


def test_masks_for_caches_that_grow_give_the_text():
    """GPT-Neo cuts each window by the number of keys, which in a static cache is that of all slots."""
    models = Peers(tiny_model("gpt_neo"), river_compile.accelerate(tiny_model("gpt_neo"), **DRAFTING))
    models.compiles = False
    for name in ("greedy", "a long prompt", "batch"):
        models.compare(CASES[name])
