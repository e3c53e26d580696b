"""Two ranks run one model together: the same answers as without River, one decision, shards in 4 bits.

One pair of processes runs all cases of :mod:`tests.runtime.rank_worker`. That takes half a minute: nothing else has two
ranks, which alone show that they come to one decision.
"""

from __future__ import annotations

import pytest
import torch

import river_compile
from river_compile.agreement import ALONE
from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.passes.experts import ROUTER
from river_compile.runtime.tensor_parallel import Ranks
from tests.runtime.rank_worker import CASES, DEPTHS, LAYERS, SLOW
from tests.support.examples import slow
from tests.support.families import CONFIGS, HIDDEN
from tests.support.ranks import run_ranks

TWO = Ranks(0, 2)


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """What both ranks found, in the cases that the tests of this run ask for."""
    folder = tmp_path_factory.mktemp("ranks")
    all_of_them = any("slow" in item.keywords for item in request.session.items if item.path == request.path)
    cases = [name for name in CASES if all_of_them or name not in SLOW]
    states, printed = run_ranks(["-m", "tests.runtime.rank_worker", str(folder), *cases], timeout=400)
    files = [folder / "0.pt", folder / "1.pt"]
    assert all(file.exists() for file in files), printed
    found = [torch.load(file, weights_only=False) for file in files]
    assert states == [0, 0], printed
    return found


def same(both, case, key):
    one, other = (found[case][key] for found in both)
    return torch.equal(one, other)


def digests(rank, case):
    return {name: digest for name, (*_, digest) in rank[case]["kept"]["packed"].items()}


class TestTheSameAnswers:
    @pytest.mark.slow
    def test_never_exit_and_unquantized_twins_have_the_bits_of_the_traced_model(self, both):
        """At every depth; and what Dynamo's tracing alone changes against the plain model is rounding."""
        found = both[0]["unquantized"]
        assert found["never depths"] == [LAYERS] * len(DEPTHS)
        assert torch.equal(both[0]["traced"]["logits"], found["never"])
        assert torch.equal(found["never"], found["mixed"])
        torch.testing.assert_close(found["plain"], found["never"], rtol=0, atol=1e-5)

    def test_both_ranks_have_the_same_logits(self, both):
        assert all(same(both, "unquantized", key) for key in ("plain", "never", "mixed"))
        assert same(both, "quantized", "logits")

    def test_kv_slots(self, both):
        """Each rank's are those at full depth to the bit, and near the plain model's."""
        for found in (rank["unquantized"] for rank in both):
            assert found["same cache"]
            for ours, plain in zip(found["cache"], found["plain cache"], strict=True):
                torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)

    @pytest.mark.slow
    def test_kv_slots_of_attention_that_is_not_split_are_equal_on_both_ranks(self, both):
        one, other = (rank["replicated attention"]["cache"] for rank in both)
        assert all(map(torch.equal, one, other))

    def test_exact_text_is_the_plain_models(self, both):
        assert torch.equal(both[0]["exact"]["greedy"], both[0]["quantized"]["text"])
        assert torch.equal(both[0]["exact"]["late"], both[0]["quantized"]["text"]), "on devices that run late"
        assert both[0]["exact"]["exact"].accepted > 0

    def test_an_accelerated_model_writes_the_plain_models_text_in_drafts_of_one_length(self, both):
        """Whatever a pass takes, so both ranks draft alike."""
        for found in (rank["accelerated"] for rank in both):
            assert torch.equal(found["text"], found["plain"])
            assert found["drafted"][0] == 5
        assert both[0]["accelerated"]["drafted"] == both[1]["accelerated"]["drafted"]

    def test_no_prompt_length_recompiles(self, both):
        assert [rank["lengths"]["new graphs"] for rank in both] == [0, 0]


class TestFourBits:
    @pytest.mark.parametrize("case", ["quantized", slow("experts")])
    def test_all_matrices_but_routers(self, both, case):
        """Each rank's own shards, others than the other rank's, in groups that divide them; and nothing warns."""
        for rank in both:
            found = rank[case]["kept"]
            assert len(found["packed"]) == 4 * LAYERS
            assert set(found["reasons"]) <= {ROUTER}
            assert all(shape[1] % group == 0 for shape, group, _ in found["packed"].values())
            assert rank[case]["told"] == []
        assert digests(both[0], case).keys() == digests(both[1], case).keys()
        assert digests(both[0], case).items().isdisjoint(digests(both[1], case).items())

    @pytest.mark.slow
    def test_what_is_not_split_has_the_same_weights_on_both_ranks(self, both):
        one, other = (digests(rank, "replicated attention") for rank in both)
        assert {name.split(".")[3] for name in one} == {"self_attn", "mlp"}
        assert {name.split(".")[3] for name, _ in one.items() & other.items()} == {"self_attn"}

    @pytest.mark.slow
    def test_what_stays_in_16_bits_is_warned_of(self, both):
        """One row of it has 16 weights on each rank, and the least group is 32."""
        for number, rank in enumerate(both):
            (told,) = [text for text in rank["replicated attention"]["told"] if "16 bits" in text]
            assert f"{LAYERS} matrices of the twins of a decode graph stay in 16 bits on rank-{number}-of-2" in told
            assert "model.layers.0.mlp.down_proj: 16 input features" in told

    def test_shards_are_half_as_wide(self, both):
        shape, group, _ = both[0]["quantized"]["kept"]["packed"]["model.layers.0.self_attn.o_proj"]
        assert (shape, group) == ((HIDDEN, HIDDEN // 2), 32)

    def test_any_rank_reports_both(self, both):
        for rank in both:
            assert "rank-0-of-2" in rank["quantized"]["report"]
            assert "rank-1-of-2" in rank["quantized"]["report"]
            shown = rank["quantized"]["shown"]["graphs"][-1]["processes"]
            assert [found["matrices"] for found in shown] == [4 * LAYERS] * 2

    def test_a_weight_that_changes_on_one_rank_alone_is_packed_again(self, both):
        assert [rank["changed"]["changes"] for rank in both] == [0, 2]

    @pytest.mark.slow
    def test_artifacts_are_of_a_rank_and_of_a_number_of_ranks(self, both):
        found = both[0]["saved twins"]
        assert found["same"]
        assert found["names"] == ["rank-0-of-2", "rank-1-of-2"]
        assert "has rank-0-of-2 and rank-1-of-2, the parts of a model" in found["refusals"][0]
        assert "on 2 ranks, and this one runs on 4" in found["refusals"][1]


class TestOneDecision:
    def test_the_first_ranks_score_decides_for_both(self, both):
        """The second one's is five higher and alone would leave."""
        assert [rank["scores"]["depths"] for rank in both] == [[LAYERS] * 3] * 2
        assert same(both, "scores", "logits")
        assert [rank["scores"]["leaving"] for rank in both] == [[1, 1]] * 2

    def test_sampled_text_is_the_first_ranks(self, both):
        """In exact mode and in the package's own loop, whatever the seed of the others."""
        assert same(both, "exact", "sampled")
        assert same(both, "exact", "own loop")

    def test_what_crosses_the_wire(self, both):
        """Two sums of a hidden state for each block at every depth, and four bytes for each check that is read."""
        for rank in both:
            messages = rank["wire"]["messages"]
            for depth in range(LAYERS + 1):
                assert messages[depth] == {("all_reduce", 4 * HIDDEN): 2 * LAYERS}
            assert messages[None] == {("all_reduce", 4 * HIDDEN): 2 * LAYERS, ("broadcast", 4): LAYERS - 1}

    def test_a_rank_that_ends_ends_the_other_one(self, both):
        assert "another rank of this model ended" in both[0]["gone"]["told"]


class TestRefusals:
    def test_an_embedding_that_is_spread(self, both):
        assert "tensor_parallel_plan" in both[0]["whole plan"]["told"]

    @pytest.mark.parametrize(
        ("option", "fix"),
        [
            ({"offload": 2}, "Remove it"),
            ({"graphs": True}, "Remove it"),
            ({"quantizer": "gptq"}, "Use quantizer='hqq'"),
            ({"quantizer": "awq"}, "Use quantizer='hqq'"),
            ({"target_weights": "12bit"}, "Use 'model'"),
        ],
    )
    def test_an_option_that_is_not_done(self, option, fix):
        ((name, value),) = option.items()
        with pytest.raises(OptionError, match=f"^RC122: {name}={value!r}.*{fix}.*2 ranks"):
            TWO.fitted(RiverConfig.from_options(option), option)

    def test_a_mode_that_is_not_done(self):
        with pytest.raises(OptionError, match=r"^RC122: mode='reduce-overhead'.*2 ranks"):
            TWO.take_shards(torch.fx.symbolic_trace(torch.nn.Identity()), {}, "reduce-overhead")

    def test_accelerate_takes_no_quantizer_with_statistics(self, both):
        assert both[0]["accelerated"]["refusal"].startswith("RC122: quantizer='awq'")

    def test_statistics(self, both):
        assert "Remove calibration_data" in both[0]["quantized"]["statistics"]

    def test_defaults_are_those_without_statistics(self):
        config = TWO.fitted(RiverConfig(), ())
        assert (config.quantizer, config.target_weights) == ("hqq", "model")

    @pytest.mark.parametrize("quantizer", ["rtn", "symmetric"])
    def test_other_quantizers_stay(self, quantizer):
        assert TWO.fitted(RiverConfig(quantizer=quantizer), {"quantizer"}).quantizer == quantizer


class TestThePlan:
    def test_a_tied_head_stays_whole_like_the_embedding(self):
        plan = river_compile.tensor_parallel_plan(CONFIGS["llama"](2), 2)
        assert plan == {"model.embed_tokens": "replicate", "lm_head": "replicate"}

    def test_heads_that_ranks_do_not_divide_stay_whole(self):
        plan = river_compile.tensor_parallel_plan(CONFIGS["qwen2"](2), 4)
        assert {name.rpartition(".")[2] for name in plan} == {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"}
        assert set(plan.values()) == {"replicate"}


def test_one_rank_alone_exchanges_nothing():
    """No process group exists here: each of these would fail."""
    value = torch.zeros(2)
    assert ALONE.first(value) is value
    assert [ALONE.every(holds) for holds in (True, False)] == [True, False]
    assert ALONE.gather(3) == [3]
