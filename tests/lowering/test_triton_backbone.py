"""``target_kernels="river"`` with the generated kernels: 16-bit blocks run by them, in passes of all widths.

Run in Triton's interpreter on CPU tensors, against the model as it is, and exact mode to the bit against decoding
without drafts.
"""

from __future__ import annotations

import pytest
import torch

from river_compile import report
from river_compile.backend import executors_of, river
from river_compile.decoding.mode import decode as decode_loop
from river_compile.decoding.mode import exact
from river_compile.errors import ExactModeError, OptionError
from river_compile.kernels.triton import calls_linear
from river_compile.passes.program import Lowering
from river_compile.upstream.transformers import cache_argument
from tests.kernels.harness import dots_in_order
from tests.support.decoding import cache_state, decode, left_padded, new_cache
from tests.support.examples import slow
from tests.support.families import each, make, prompt
from tests.support.lowerings import BLOCK_RULES, FUSED, OPERATORS
from tests.support.recorder import recording

river_ops = torch.ops.river
LAYERS = 2
NEVER = [LAYERS] * 3
OPTIONS = {"quantizer": "rtn", "group_size": 32, "first_exit": 1, "target_kernels": "river"}


def compiled(name: str, lowering: Lowering = FUSED, dtype: torch.dtype = torch.float32, **options):
    torch._dynamo.reset()
    model = make(name, layers=LAYERS, dtype=dtype)
    model.compile(backend=river, options={**OPTIONS, "kernels": lowering, **options})
    return model


# (The weights of GPT-2 are transposed.)
@pytest.mark.parametrize("name", each(["llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_oss"], quick=["gpt2"]))
def test_never_exiting_computes_what_the_model_does(name):
    """Logits, entries and lengths, and of tokens that leave, the entries of the blocks before."""
    model = compiled(name)
    for depths in (NEVER, [1, LAYERS, 1]):
        cache, plain = new_cache(model, "full"), new_cache(model, "full")
        ours = decode(model, cache, depths, plain_prompt=True)  # (the interpreter takes long for one)
        theirs = decode(model, plain, NEVER, compiled=False)
        if depths == NEVER:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        first = [cache_state(c)[0] for c in (cache, plain)]
        torch.testing.assert_close(first[0][:2], first[1][:2], rtol=1e-4, atol=1e-4)
        assert first[0][2] == first[1][2]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_product_of_a_block_is_one_launch_on_the_model_s_own_matrices(name, monkeypatch):
    """q|k|v and gate|up are read where they are."""
    read = []
    linear = calls_linear.linear

    def note(x, weight, *others):
        read.append([w.data_ptr() for w in weight] if isinstance(weight, list) else weight.data_ptr())
        return linear(x, weight, *others)

    model = compiled(name)
    cache = new_cache(model, "full")
    decode(model, cache, NEVER[:1], plain_prompt=True)
    monkeypatch.setattr(calls_linear, "linear", note)
    decode(model, new_cache(model, "full"), NEVER[:1], plain_prompt=True)
    expected = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for matrices in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            attention.o_proj,
            [mlp.gate_proj, mlp.up_proj],
            mlp.down_proj,
        ):
            several = isinstance(matrices, list)
            expected.append([m.weight.data_ptr() for m in matrices] if several else matrices.weight.data_ptr())
    assert read == [*expected, model.lm_head.weight.data_ptr()]
    graph = next(g for g in report(model).to_dict()["graphs"] if g["kind"] == "decode")
    # Blocks and twins take the same rules, and so do the two heads; a check takes its block's last addition.
    assert graph["fused"] == {rule: 2 * LAYERS - (rule == "down + residual") for rule in BLOCK_RULES} | {
        "norm + head": 2,
        "exit score": 1,
    }
    assert [(miss["rule"], miss["segment"]) for miss in graph["missed"]] == [("down + residual", "block_1")]


@pytest.mark.parametrize("name", each(["qwen2", "llama", "gemma3"], quick=["llama"]))
@torch.no_grad()
def test_weights_in_12_bits(name):
    """Blocks and the head, with their norms, biases, gates and residuals; prompts unpack what they read.

    A matrix that 12 bits would hold badly is read in 16.
    """
    outcomes = []
    for weights in ("model", "12bit"):
        model = compiled(name, dtype=torch.bfloat16, target_weights=weights)
        weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
        weight.mul_(torch.logspace(-30, 0, weight.numel()).view_as(weight).bfloat16())
        outcomes.append(decode(model, new_cache(model, "full"), NEVER))
        packed = {g["kind"]: g["lossless_bytes"] > 0 for g in report(model).to_dict()["graphs"]}
        assert packed == dict.fromkeys(("prefill", "decode"), weights == "12bit")
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0.05, atol=0.05)


def test_experts_in_16_bits_stay_the_model_s_own():
    """Operators of the C++ kernels, which would read numbers of experts back from a GPU, are in no program."""
    model = compiled("mixtral")
    decode(model, new_cache(model, "full"), [1, LAYERS], plain_prompt=True)
    (program,) = (executor.program for executor in executors_of(model) if executor.program.kind == "decode")
    for segments, stacks in ((program.blocks, 0), (program.twins, 2)):
        for segment in segments:
            calls = [node for node in segment.code.module.graph.nodes if node.op == "call_function"]
            assert not {river_ops.mixture.default, river_ops.route.default} & {node.target for node in calls}
            layouts = [node.args[6] for node in calls if node.target is river_ops.experts.default]
            assert layouts == ["triton"] * stacks


@pytest.mark.slow
def test_the_products_go_through_inductor():
    model = compiled("llama", Lowering("inductor", "triton", fuse=True))
    ours = decode(model, new_cache(model, "full"), NEVER)
    theirs = decode(model, new_cache(model, "full"), NEVER, compiled=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "launches"), [(5, 4 * LAYERS + 1), (20, 0)])
def test_wide_passes_are_a_library_s(tokens, launches, monkeypatch):
    """A prompt of up to 16 tokens runs the kernels that verify drafts."""
    made = []
    linear = calls_linear.linear
    monkeypatch.setattr(calls_linear, "linear", lambda x, *others: made.append(x.shape) or linear(x, *others))
    model = compiled("llama")
    ids, caches = prompt(tokens, 1), [new_cache(model, "full") for _ in range(2)]
    with torch.no_grad():
        ours = model(ids, **{cache_argument(model): caches[0]}).logits
        theirs = model.forward(ids, **{cache_argument(model): caches[1]}).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(made) == launches
    (graph,) = report(model).to_dict()["graphs"]
    assert graph["fused"] == dict.fromkeys(BLOCK_RULES, LAYERS) | {"norm + head": 1}


# Drafts of a fixed length, most of which do not hold.
DRAFTS = {"custom_generate": exact, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
VERIFIES = {"criterion": "confidence", "threshold": 0.0}


def generated(model, rows: int, **how):
    """Generates and keeps the logits that tokens were chosen by."""
    torch.manual_seed(0)
    ids, mask = (given.to(model.device) for given in left_padded(rows, 5))
    wanted = {"output_logits": True, "return_dict_in_generate": True, "cache_implementation": "static"}
    return model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **wanted, **how)


@pytest.mark.parametrize(
    ("name", "rows", "dtype"),
    [slow("qwen2", 1, torch.float32), slow("qwen3", 1, torch.bfloat16), slow("llama", 3, torch.bfloat16)],
)
def test_verified_text_has_the_bits_of_decoding_without_drafts(name, rows, dtype):
    """Every token's logits, in passes of one position and of several, captured as one launch a pass."""
    with recording(), dots_in_order():
        check_verified_text(compiled(name, dtype=dtype, graphs=True, **VERIFIES), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_on_a_gpu_too(name, rows):
    torch._dynamo.reset()
    model = make(name, layers=LAYERS, dtype=torch.bfloat16).cuda()
    model.compile(backend=river, options={**OPTIONS, **VERIFIES})
    check_verified_text(model, rows)


def check_verified_text(model, rows: int) -> None:
    drafted = generated(model, rows, strict=True, **DRAFTS)
    plain = generated(model, rows, custom_generate=decode_loop)
    assert torch.equal(drafted.sequences, plain.sequences)
    for ours, theirs in zip(drafted.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    found = report(model).to_dict()
    captured = {record["unit"] for graph in found["graphs"] for record in graph["captures"]["captures"]}
    assert f"last 0-{LAYERS}" in captured
    if rows == 1:  # several rows decode without River
        assert "tail 0" in captured
        assert 0 < found["exact"]["accepted"] < found["exact"]["drafted"]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma3", {}, "not all of block_1 is the generated kernels'"),
        ("llama", {"target_weights": "12bit"}, "one row of weights in 12bit has a kernel of its own"),
        ("llama", {"criterion": "similarity"}, "exit checks by criterion='similarity'"),
        ("llama", {"target_kernels": "model"}, "matmuls are not River's own"),
    ],
)
def test_what_strict_cannot_keep_is_an_error(name, options, reason):
    model = compiled(name, dtype=torch.bfloat16, **{**VERIFIES, **options})
    with pytest.raises(
        ExactModeError, match=f"Cannot guarantee strict=True for this {type(model).__name__}: .*{reason}"
    ):
        generated(model, 1, strict=True, **DRAFTS)


def test_without_such_kernels_the_option_is_refused():
    model = compiled("llama", OPERATORS)
    with pytest.raises(OptionError, match="target_kernels='river' requires the C\\+\\+ kernels or the generated ones"):
        decode(model, new_cache(model, "full"), NEVER)
