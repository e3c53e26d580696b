"""The rewritten model is the plain model wherever it promises to be, for every family and both caches.

The eager lowering runs the rewritten graph operator by operator, so that an exit can be held to the very bits of full
depth: logits, keys, values and lengths. What Inductor makes of it is compared within a tolerance, on fewer families.
"""

from __future__ import annotations

import pytest
import torch

import river_compile
from river_compile.backend import river
from river_compile.exits import forced_depth
from tests.support.decoding import cache_state, decode, new_cache
from tests.support.families import FAMILIES, each, make, prompt
from tests.support.lowerings import FUSED, OPERATORS, UNQUANTIZED, UNQUANTIZED_INDUCTOR

DYNAMIC = [
    "llama",
    "gemma3",
    "phi",
    "gpt2",
    "falcon",
    "mixtral",
    "mpt",
]  # every form of block; the cache code is one for all
EAGER = {"kernels": UNQUANTIZED, "first_exit": 1}


@pytest.mark.parametrize(
    ("name", "kind"), each([(name, "static") for name in FAMILIES] + [(name, "dynamic") for name in DYNAMIC])
)
@pytest.mark.slow
def test_any_exit_of_an_unquantized_river_is_the_plain_model(name, kind):
    """Every depth from 0 to never, one token each, left padding.

    Full depth gives the plain model's logits and cache up to rounding (it may mask otherwise when it is traced), and
    leaving anywhere gives the bits of full depth.
    """
    model = make(name, layers=2)
    layers = model.config.num_hidden_layers
    plain, never, mixed = (new_cache(model, kind) for _ in range(3))
    steps = [*range(layers + 1)]
    plain_logits = decode(model, plain, steps, compiled=False)
    model.compile(backend=river, options=EAGER)
    never_logits = decode(model, never, [layers for _ in steps])
    mixed_logits = decode(model, mixed, steps)
    assert_same_cache(plain, never, exact=False)
    assert_same_cache(never, mixed, exact=True)
    for step in range(len(steps) + 1):
        torch.testing.assert_close(plain_logits[step], never_logits[step], rtol=1e-4, atol=1e-4)
        assert torch.equal(never_logits[step], mixed_logits[step]), f"logits of step {step}"


def test_sinks_windows_and_experts_give_the_plain_text():
    """GPT-OSS, prompts of 5 and 20 tokens: every token exits immediately, half of the blocks see 8 tokens."""
    model, ids = make("gpt_oss", layers=2), prompt(20, 2)
    mask = torch.ones_like(ids)
    ids[0, :15] = mask[0, :15] = 0
    how = {"max_new_tokens": 32, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    how |= {"cache_implementation": "static", "disable_compile": True}
    plain = model.generate(ids, attention_mask=mask, **how)
    model.compile(backend=river, options=EAGER)
    with forced_depth(0):
        ours = model.generate(ids, attention_mask=mask, **how)
    torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.sequences, plain.sequences)


def assert_same_cache(expected, actual, exact: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    for layer, (a, b) in enumerate(zip(cache_state(expected), cache_state(actual), strict=True)):
        torch.testing.assert_close(a[:2], b[:2], **tolerance, msg=lambda text, layer=layer: f"layer {layer}: {text}")
        assert a[2] == b[2], f"length of layer {layer}"


before_torch_2_13 = pytest.mark.xfail(
    torch.__version__.startswith(("2.11.", "2.12.")), reason="Inductor writes C++ for it there that does not compile"
)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), ("gpt2", "sdpa"), pytest.param("gemma2", "eager", marks=before_torch_2_13)],
)
@pytest.mark.slow
def test_inductor_gives_the_plain_model_within_rounding(name, attention):
    """Full depth, and an unquantized exit, through compiled segments: close logits and caches, equal lengths."""
    model = make(name, layers=2, attention=attention)
    layers = model.config.num_hidden_layers
    depths = [layers, 0, 1, layers]
    expected_cache, actual_cache = new_cache(model, "static"), new_cache(model, "static")
    expected = decode(model, expected_cache, depths, compiled=False)
    model.compile(backend=river, options={"kernels": UNQUANTIZED_INDUCTOR})
    actual = decode(model, actual_cache, depths)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_same_cache(expected_cache, actual_cache, exact=False)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_reaches_every_segment():
    """The difference from the plain model under autocast is small compared with what autocast does.

    The model's blocks leave autocast for the attention scores.
    """
    model = make("gpt2", layers=2, attention="eager")
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    plain, ours = new_cache(model, "static"), new_cache(model, "static")
    without = decode(model, new_cache(model, "static"), [2, 0, 1], compiled=False)
    with autocast():
        expected = decode(model, plain, [2, 0, 1], compiled=False)
        model.compile(backend=river, options=EAGER)
        found = decode(model, ours, [2, 0, 1])
    for a, b, c in zip(expected, found, without, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - b).norm() < 0.2 * (a - c).norm()
    for a, b in zip(cache_state(plain), cache_state(ours), strict=True):
        assert (a[0].dtype, a[1].dtype, a[2]) == (b[0].dtype, b[1].dtype, b[2])


@pytest.mark.parametrize("lowering", [OPERATORS, FUSED], ids=["unfused", "fused"])
@pytest.mark.slow
def test_twins_under_autocast_have_the_plain_models_dtypes(lowering):
    """A family with biases, through the int4 product and the generated kernels: logits close to those without."""
    model = make("phi", layers=2)
    plain, ours = new_cache(model, "static"), new_cache(model, "static")
    with autocast():
        expected = decode(model, plain, [0], compiled=False)
    model.compile(backend=river, options={"kernels": lowering, "quantizer": "rtn", "group_size": 32, "first_exit": 1})
    without = decode(model, new_cache(model, "static"), [0])
    with autocast():
        found = decode(model, ours, [0])
    assert found[1].dtype == expected[1].dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found[1].float().flatten(), without[1].flatten(), dim=0) > 0.998
    for a, b in zip(cache_state(plain), cache_state(ours), strict=True):
        assert (a[0].dtype, a[1].dtype, a[2]) == (b[0].dtype, b[1].dtype, b[2])


@pytest.mark.parametrize("family", each(["llama", "opt"]))
@pytest.mark.slow
def test_generating_under_autocast(family):
    """Rotated keys stay in float32 there and values do not, so the cache has two dtypes, which no kernel takes.

    Without a rotation both are in bfloat16, as products are, whatever their norms are in.
    """
    ids, found = torch.arange(5, 17)[None], []
    for accelerated in (False, True):
        model = make(family, layers=2)
        if accelerated:
            river_compile.accelerate(model, group_size=32, quantizer="rtn", num_assistant_tokens=3)
        with autocast():
            found.append(
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0,
                    cache_implementation="static", return_dict_in_generate=True, output_logits=True,
                )
            )  # fmt: skip
    expected, ours = found
    assert {t.dtype for layer in ours.past_key_values.layers for t in (layer.keys, layer.values)} == {
        t.dtype for layer in expected.past_key_values.layers for t in (layer.keys, layer.values)
    }
    for a, b in zip(expected.logits[0], ours.logits[0], strict=True):  # (later ones follow from other tokens, perhaps)
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.998
    assert ours.sequences.shape == expected.sequences.shape


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype):
    """A 16-bit model whose token leaves through a 4-bit twin keeps its dtype and stays close to full depth."""
    model = make("qwen2", dtype=dtype, layers=2)
    model.compile(backend=river, options={"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32})
    never, left = (decode(model, new_cache(model, "static"), [depth], plain_prompt=True)[-1] for depth in (2, 1))
    assert left.dtype == never.dtype == dtype
    assert left.isfinite().all()
    assert torch.nn.functional.cosine_similarity(left.flatten().double(), never.flatten().double(), dim=0) > 0.9
