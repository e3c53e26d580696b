"""Calls that differ in their arguments do not influence each other, whichever of them transformers' own loop runs.

Every text is compared with a plain model's, in float32.
"""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile.errors import EmbeddingError, OptionError
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS
from tools.families.tiny import tiny_model

TWINS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32}
EAGER = {**TWINS, "compile_cache": False, "background_packing": False}
DRAFTS = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}


def accelerated(family: str, **options: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns an accelerated model and its plain twin."""
    model = make(family, torch.float32, layers=2)
    plain = copy.deepcopy(model)
    return river_compile.accelerate(model, **{**EAGER, **options}), plain


def generate(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    return model.generate(ids, **{**given, **options})


def fallbacks(said: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in said if issubclass(w.category, river_compile.RiverWarning)]


@pytest.fixture(scope="module")
def gpt2():
    return accelerated("gpt2", **DRAFTS)


@pytest.fixture(scope="module")
def llama():
    return accelerated("llama", **DRAFTS)


@pytest.mark.parametrize("drafts", [DRAFTS, pytest.param({}, marks=pytest.mark.slow)], ids=["constant", "measured"])
@pytest.mark.parametrize("first", ["without", pytest.param("with", marks=pytest.mark.slow)])
def test_an_argument_of_one_call_alone_is_read_in_that_call_alone(first, drafts):
    """Token types change GPT-2's text, so a state that was bound without them must not run with them."""
    model, plain = accelerated("gpt2", **drafts)
    ids, types = prompt(9, 1), prompt(9, 1, seed=5)
    calls = [{}, {"token_type_ids": types}]
    for options in (calls if first == "without" else calls[::-1]) * 2:
        assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))
    assert not torch.equal(generate(plain, ids), generate(plain, ids, **calls[1]))


@pytest.mark.slow
def test_one_tensor_for_two_arguments_is_another_program_than_two_tensors(gpt2):
    model, plain = gpt2
    ids = prompt(9, 1)
    positions = torch.arange(9)[None]
    for types in (positions, prompt(9, 1, seed=5), positions):
        options = {"position_ids": positions, "token_type_ids": types}
        assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))


@pytest.mark.parametrize("tokens", [slow(1), 4, slow(64)])
def test_a_prompt_in_chunks_has_the_plain_text(tokens, llama):
    """Rows are padded by more than a chunk, and masks and positions are those of the tokens so far."""
    model, plain = llama
    ids, mask = prompt(20, 2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    with warnings.catch_warnings(record=True) as said, river_compile.trace() as trace:
        warnings.simplefilter("always")
        text = generate(model, ids, attention_mask=mask, prefill_chunk_size=tokens)
        one = generate(model, ids[:1], prefill_chunk_size=tokens)
    assert torch.equal(text, generate(plain, ids, attention_mask=mask))
    assert torch.equal(one, generate(plain, ids[:1]))
    assert fallbacks(said) == []
    assert trace.cycles, "a single row drafts"


def test_a_batch_keeps_each_prompts_mask(llama):
    """A hidden token behind the first piece of a prompt stays hidden."""
    model, plain = llama
    ids = prompt(300, 1)
    mask = torch.ones_like(ids)
    mask[0, 150:280] = 0
    options = {"attention_mask": mask, "position_ids": torch.arange(300)[None]}
    with river_compile.ContinuousBatch(model, 2) as batch:
        text = batch.submit(lambda: generate(model, ids, **options)).result()
    assert torch.equal(text, generate(plain, ids, **options))
    assert not torch.equal(text, generate(plain, ids))


@pytest.mark.slow
def test_calls_with_other_arguments_run_beside_a_batch(gpt2):
    model, plain = gpt2
    ids, types = prompt(9, 1), prompt(9, 1, seed=5)
    expected = [generate(plain, ids), generate(plain, ids, token_type_ids=types)]
    with river_compile.ContinuousBatch(model, 3) as batch:
        futures = [
            batch.submit(lambda given=given: generate(model, ids, **given))
            for given in ({}, {"token_type_ids": types}) * 2
        ]
        texts = [future.result() for future in futures]
    assert all(torch.equal(text, expected[number % 2]) for number, text in enumerate(texts))


def test_leaving_a_batch_waits_for_what_was_submitted(llama):
    model, plain = llama
    ids, release = prompt(9, 1), threading.Event()

    def call() -> Tensor:
        release.wait()
        return generate(model, ids)

    with river_compile.ContinuousBatch(model, 2) as batch:
        futures = [batch.submit(call) for _ in range(3)]  # the third one waits for a thread
        threading.Timer(0.2, release.set).start()
    assert not batch.alive
    assert all(torch.equal(future.result(), generate(plain, ids)) for future in futures)


class TestCallsByTransformersLoop:
    def test_a_draft_by_early_exit_leaves_the_model_as_it_was(self, llama):
        model, plain = llama
        ids = prompt(9, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = generate(model, ids, assistant_early_exit=1)
        assert torch.equal(text, generate(plain, ids, assistant_early_exit=1))
        assert model.config.num_hidden_layers == 2
        assert torch.equal(generate(model, ids), generate(plain, ids))

    def test_an_error_leaves_the_configuration_as_it_was(self, llama):
        """Transformers cuts the model's layers for each draft, and an error in a draft left them cut."""
        model, plain = llama
        ids = prompt(9, 1)

        def fail(*_: object) -> None:
            if model.config.num_hidden_layers == 1:
                raise ZeroDivisionError

        hook = model.register_forward_pre_hook(fail)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each reason, so the order of the tests decides
            with pytest.raises(ZeroDivisionError):
                generate(model, ids, assistant_early_exit=1)
        hook.remove()
        assert model.config.num_hidden_layers == 2
        assert torch.equal(generate(model, ids), generate(plain, ids))

    def test_what_a_streamer_generates_meanwhile_is_transformers_too(self, llama):
        model, plain = llama
        ids, inner = prompt(9, 1), []

        class Asks(BaseStreamer):
            def put(self, value: Tensor) -> None:
                if not inner:
                    inner.append(generate(model, ids))

            def end(self) -> None: ...

        with pytest.warns(river_compile.RiverWarning, match="use_cache=False"), river_compile.trace() as trace:
            text = generate(model, ids, use_cache=False, streamer=Asks())
        assert trace.tokens == []
        assert torch.equal(text, generate(plain, ids))
        assert torch.equal(inner[0], text)

    @pytest.mark.parametrize(
        ("stance", "reason"),
        [
            ("force_eager", "turns compilation off"),
            pytest.param("eager_on_recompile", "'eager_on_recompile'", marks=pytest.mark.slow),
        ],
    )
    def test_a_stance_that_does_not_compile_is_named(self, stance, reason):
        model, plain = accelerated("llama")
        ids = prompt(9, 1)
        with torch.compiler.set_stance(stance), pytest.warns(river_compile.RiverWarning, match=reason) as said:
            text = generate(model, ids)
        assert "model.compile" not in "".join(fallbacks(said.list))
        assert torch.equal(text, generate(plain, ids))
        with river_compile.trace() as trace:
            assert torch.equal(generate(model, ids), text)
        assert trace.tokens, "the stance is the default again"


@pytest.mark.parametrize("token", [-1, 5000])
def test_a_token_outside_of_the_vocabulary_is_an_index_error_that_names_it(token):
    model, plain = accelerated("llama", kernels="native")
    ids = prompt(9, 1)
    bad = ids.clone()
    bad[0, 4] = token
    with pytest.raises(IndexError):
        generate(plain, bad)
    with pytest.raises(EmbeddingError, match=rf"input_ids from (\d+ to {token}|{token} to \d+) and"):
        generate(model, bad)
    assert torch.equal(generate(model, ids), generate(plain, ids))


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = make("llama", torch.float32, layers=1)
    with pytest.raises(OptionError, match="is on the meta device, which holds no values"):
        river_compile.accelerate(model)


def test_autocast_quantizes_in_float32():
    """The statistics of a model's inputs are float32 sums, whatever its matmuls compute in."""
    model, plain = accelerated("llama", quantizer="gptq", **DRAFTS)
    ids = prompt(9, 1)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = generate(model, ids, max_new_tokens=6)
        assert torch.equal(text, generate(plain, ids, max_new_tokens=6))


@pytest.mark.parametrize("model_type", ["moshi", slow("prophetnet")])
def test_a_model_that_takes_no_full_static_cache_keeps_its_text(model_type):
    """Attention that a sliding cache alone limits, and code that fails on a static cache, which only a run shows."""
    model, ids = tiny_model(model_type), prompt()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **settings)
    river_compile.accelerate(model, kernels=OPERATORS, quantizer="rtn", group_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert torch.equal(model.generate(ids, **settings), plain)
