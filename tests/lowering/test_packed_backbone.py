"""A backbone whose weights are packed in 12 bits: the text and the scores of the one in 16 bits, to the bit."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LogitsProcessor, LogitsProcessorList

import river_compile
from river_compile import RiverWarning, report
from river_compile.building import choose
from river_compile.building.graph_record import Graphs
from river_compile.errors import OptionError
from river_compile.kernels import measured
from river_compile.kernels.native import load as native
from river_compile.kernels.native.build import choose_isa
from river_compile.kernels.quant import lossless
from river_compile.record import record_of
from river_compile.twins import digests, pack
from tests.support.examples import slow
from tests.support.families import each, make, prompt
from tests.support.lowerings import OPERATORS

pytestmark = pytest.mark.skipif(choose_isa().name == "portable", reason="needs vectors")

DOWN = "model.layers.1.mlp.down_proj"


def model_of(family="llama", **options):
    return make(family, layers=2, dtype=torch.bfloat16, **options)


def accelerated(model, weights, quality="exact", **options):
    options = {"quantizer": "rtn", "group_size": 32, "kernels": "native", **options}
    return river_compile.accelerate(model, quality, target_weights=weights, **options)


class Recorder(LogitsProcessor):
    """Keeps the scores of each step, as asking `generate` for them does, and lets it choose the cache."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def generate(model, rows=1):
    """Returns text and scores of each step."""
    ids, recorder = prompt(9, seed=3).repeat(rows, 1), Recorder()
    text = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([recorder]),
    )
    return text, torch.cat([scores.flatten() for scores in recorder.scores])


def assert_alike(a, b):
    assert all(map(torch.equal, generate(a), generate(b)))


@pytest.mark.parametrize(
    "family", each(("llama", "qwen2", "gemma2", "phi3", "gpt_neox", "mixtral", "qwen3_moe"), ["mixtral"])
)
def test_texts_and_scores_are_those_of_weights_in_16_bits(family):
    """With biases, merged and gated products, tied and untied heads, and stacks of experts."""
    packed, plain = accelerated(model_of(family), "12bit"), accelerated(model_of(family), "model")
    assert_alike(packed, plain)
    assert all(map(torch.equal, generate(packed, 3), generate(plain, 3)))
    sizes = [graph["lossless_bytes"] for graph in report(packed).to_dict()["graphs"]]
    assert all(sizes)
    assert "MB of weights, packed without loss" in str(report(packed))
    assert all(graph["lossless_bytes"] == 0 for graph in report(plain).to_dict()["graphs"])


@pytest.mark.parametrize(("weights", "bits"), [("12bit", 12), ("model", 16)])
def test_a_token_reads_the_experts_that_it_chose(weights, bits):
    """Two of four in each stack, in 12 bits and in 16; the report tells both sizes."""
    model = accelerated(model_of("mixtral"), weights)
    generate(model)
    graph = next(graph for graph in report(model).to_dict()["graphs"] if graph["kind"] == "decode")
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    numbers = sum(stack.numel() for stack in stacks)
    held = numbers * bits // 8
    sides = 0.01 * 8 * numbers + 1024 * len(stacks) if bits == 12 else 0  # space for patches, their places, palettes
    assert held <= graph["expert_bytes"] <= held + sides
    assert graph["chosen_bytes"] == graph["expert_bytes"] // 2
    assert graph["fused"]["router + experts"] == len(stacks)  # in layers and twins
    for record in record_of(model.parameters()).of(Graphs):  # of several tokens, each chooses two by itself
        others = record.backbone_bytes - record.chosen_bytes
        read = [others + record.expert_bytes * share for share in (2 / 4, 3 / 4, 15 / 16)]
        assert [record.reads(tokens) for tokens in (1, 2, 4)] == pytest.approx([r / read[0] for r in read])
    assert "MB of the layers'" in str(report(model))


def in_place(model):
    model.get_submodule(DOWN).weight.mul_(-1)


def other_parameter(model):
    layer = model.get_submodule(DOWN)
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def other_values(model):
    """Of other magnitudes, and so with another palette and other patches."""
    model.get_submodule(DOWN).weight.copy_(torch.randn_like(model.get_submodule(DOWN).weight) * 0.3)


@pytest.mark.parametrize("change", [in_place, other_parameter, other_values])
@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
@torch.no_grad()
def test_weights_that_change_are_packed_again(change):
    """The next text is that of the new weights, and nothing else in the model's state has changed."""
    torch.manual_seed(0)
    model = accelerated(model_of(), "12bit")
    before = generate(model)
    change(model)
    fresh = model_of()
    fresh.load_state_dict(model.state_dict())
    after = generate(model)
    assert all(map(torch.equal, after, generate(accelerated(fresh, "model"))))
    assert not torch.equal(after[1], before[1])


@torch.no_grad()
def test_a_matrix_of_too_many_magnitudes_stays_in_16_bits():
    models = [model_of(), model_of()]
    for model in models:
        weight = model.get_submodule(DOWN).weight
        weight.copy_(weight * torch.logspace(-30, 0, weight.numel()).view_as(weight).bfloat16())
    packed, plain = accelerated(models[0], "12bit"), accelerated(models[1], "model")
    assert_alike(packed, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RiverWarning)  # (twins are packed again)
        for model in models:
            model.get_submodule(DOWN).weight.copy_(model.model.layers[0].mlp.down_proj.weight)
        assert_alike(packed, plain)


class TestTheCompileCache:
    @pytest.fixture
    def saved(self, tmp_path, monkeypatch):
        """What a first process left, which packed each matrix but one; and its text and scores."""
        monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
        model = self.model()
        outcome = generate(accelerated(model, "12bit"))
        (file,) = tmp_path.glob("backbone-*/packed/twins.safetensors")
        return file, outcome

    def model(self):
        model = model_of()
        with torch.no_grad():
            weight = model.get_submodule(DOWN).weight
            weight.copy_(weight * torch.logspace(-30, 0, weight.numel()).view_as(weight).bfloat16())
        return model

    @pytest.fixture
    def packed(self, monkeypatch):
        """How many matrices were packed."""
        numbers, pack = [], lossless.pack_12bit
        monkeypatch.setattr(
            lossless, "pack_12bit", lambda weight, *counts: numbers.append(len(weight)) or pack(weight, *counts)
        )
        return numbers

    def test_keeps_them_for_the_next_process(self, saved, packed):
        assert all(map(torch.equal, generate(accelerated(self.model(), "12bit")), saved[1]))
        assert not packed

    def test_has_none_of_another_layout(self, saved):
        """The same 8-bit weights are what they would be in a fresh process: an error that says what they lack."""
        with pytest.raises(OptionError, match="target_weights='8bit' requires weights that are 8-bit numbers"):
            generate(accelerated(self.model(), "8bit"))

    @torch.no_grad()
    def test_has_none_of_other_weights(self, saved, packed):
        changed, plain = self.model(), self.model()
        for model in (changed, plain):
            model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
        assert_alike(accelerated(changed, "12bit"), accelerated(plain, "model"))
        assert len(packed) > 5

    def test_that_is_damaged_is_written_anew(self, saved, packed):
        content = bytearray(saved[0].read_bytes())
        content[-100] ^= 1
        saved[0].write_bytes(content)
        with pytest.warns(RiverWarning, match="^RC103: Cached weights cannot be used and are quantized again"):
            assert all(map(torch.equal, generate(accelerated(self.model(), "12bit")), saved[1]))
        assert len(packed) > 5
        assert saved[0].read_bytes() != content


@pytest.mark.parametrize("start", ["that packs", "that finds changed weights"])
@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
@torch.no_grad()
def test_a_start_hashes_each_weight_once(start, monkeypatch):
    """For its twin and for its packed form, which are made of the same."""
    hashed, digest = [], digests.digest_of
    monkeypatch.setattr(digests, "digest_of", lambda some: hashed.extend(map(id, some)) or digest(some))
    model = accelerated(model_of(), "12bit")
    generate(model)
    if start == "that finds changed weights":
        hashed.clear()
        for parameter in model.model.layers.parameters():
            parameter.mul_(-1)
        generate(model)
    matrices = {id(parameter) for parameter in model.model.layers.parameters() if parameter.dim() == 2}
    assert matrices <= set(hashed)
    assert len(hashed) == len(set(hashed))


def packed_by_default(quality="exact"):
    model = accelerated(model_of(), "auto", quality)
    generate(model)
    return [graph["lossless_bytes"] for graph in report(model).to_dict()["graphs"]]


@pytest.fixture
def gains(monkeypatch):
    """A function that sets what a pass gains in 12 bits, by its rows, for matrices of any size."""
    monkeypatch.setattr(measured, "_SMALL", 0)
    calls = []

    def gain(by_rows):
        monkeypatch.setattr(measured, "pass_speedups", lambda shapes: calls.append(shapes) or by_rows)
        return calls

    return gain


@pytest.mark.parametrize(
    ("by_rows", "exact", "fast"),
    [
        ({1: 1.3, 4: 1.2, 6: 1.0}, True, True), ({1: 1.3, 4: 0.8, 6: 0.8}, False, True),
        slow({1: 1.0, 4: 1.4, 6: 1.4}, True, False), slow({1: 1.04, 4: 1.04, 6: 1.04}, False, False),
        ({}, False, False),
    ],
)  # fmt: skip
def test_weights_are_packed_where_whole_passes_were_measured_to_gain(gains, by_rows, exact, fast):
    """Where the passes tie, the model's own weights stay."""
    gains(by_rows)
    assert {found > 0 for found in packed_by_default()} == {exact}
    assert {found > 0 for found in packed_by_default("fast")} == {fast}


def test_a_pass_is_measured_with_all_its_weights(gains):
    """Two layers of four matmuls, some of which are merged, and the head."""
    calls = gains({1: 1.0, 4: 1.0, 6: 1.0})
    model = model_of()
    generate(accelerated(model, "auto"))
    matmuls = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert {sum(n * k * count for (n, k), count in shapes) for shapes in calls} == {matmuls}


def test_small_matrices_and_models_without_room_stay_in_16_bits(gains, monkeypatch):
    gains({1: 2.0, 4: 2.0, 6: 2.0})
    monkeypatch.setattr(measured, "_SMALL", 1 << 18)
    assert set(packed_by_default()) == {0}
    monkeypatch.setattr(measured, "_SMALL", 0)
    monkeypatch.setattr(choose, "memory_bytes", lambda: 1000)
    assert set(packed_by_default()) == {0}


@pytest.mark.parametrize(
    ("cache", "layers", "megabytes"),
    [(None, 30, 101), (32 << 20, 30, 101), (480 << 20, 30, 503), (480 << 20, 4, 268), (480 << 20, 1, 101)],
)
def test_a_measured_pass_reads_more_than_the_cache_keeps(monkeypatch, cache, layers, megabytes):
    """Or all of a smaller model, of which the cache keeps as much while it runs."""
    monkeypatch.setattr(measured, "last_level_cache", lambda: cache)
    assert round(measured.sampled_bytes({(4096, 8192): layers}) / 1e6) == megabytes


def test_what_was_measured_is_kept_for_the_machine(monkeypatch, tmp_path):
    native.load()
    library = measured.kernels_library(choose_isa())
    monkeypatch.setattr(measured, "kernels_library", lambda isa: library)  # (another home has none)
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_LEAST_BYTES", 1 << 16)
    shapes = (((64, 128), 2), ((128, 64), 1))
    measured.pass_speedups.cache_clear()
    try:
        first = measured.pass_speedups(shapes)
        (file,) = tmp_path.rglob("pass_*.json")
        assert first.keys() == {1, 4, 6}
        file.write_text('{"1": 3.0, "4": 2.0, "6": 1.0}')
        measured.pass_speedups.cache_clear()
        assert measured.pass_speedups(shapes) == {1: 3.0, 4: 2.0, 6: 1.0}
        file.write_text("{")
        measured.pass_speedups.cache_clear()
        assert measured.pass_speedups(shapes).keys() == {1, 4, 6}
    finally:
        measured.pass_speedups.cache_clear()


def test_twins_are_saved_by_the_first_program_that_has_some(tmp_path):
    """A prompt's program reads packed weights and has no twins."""
    options = {"twins": tmp_path / "twins", "on_missing_twins": "save"}
    saved = generate(accelerated(model_of(), "12bit", **options))
    assert [*(tmp_path / "twins").iterdir()]
    read = generate(accelerated(model_of(), "12bit", **options))
    assert all(map(torch.equal, saved, read))


def test_the_model_keeps_its_tensors():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    generate(accelerated(model, "12bit"))
    after = model.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("options", [{"quality": "fast"}, {"strict": True}], ids=["fast", "strict"])
def test_other_qualities_have_it_too(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RiverWarning)
        packed, plain = (accelerated(model_of(), weights, **options) for weights in ("12bit", "model"))
        assert_alike(packed, plain)


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"kernels": OPERATORS}, torch.bfloat16, "requires the C.. kernels on a CPU"),
        ({"target_kernels": "model"}, torch.bfloat16, "requires the C.. kernels on a CPU"),
        ({}, torch.float32, r"requires bfloat16 weights, .* Call model.to\(torch.bfloat16\)"),
    ],
)
def test_where_it_is_not_possible_it_says_so(options, dtype, message):
    model = accelerated(make("llama", layers=2, dtype=dtype), "12bit", **options)
    with pytest.raises(OptionError, match=message):
        generate(model)


class TestLaterProcesses:
    """The first process reads the model's own weights; it packs them for later ones while it answers."""

    @pytest.fixture(autouse=True)
    def everything_pays(self, gains, monkeypatch, tmp_path):
        monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(pack, "_SMALL", 0)
        gains({1: 2.0, 4: 2.0, 6: 2.0})

    def run(self, model=None):
        """Generates with a model as a new process would; returns texts and scores, and origins and bytes."""
        model = accelerated(model or model_of(), "auto")
        found = generate(model)
        graphs = report(model).to_dict()["graphs"]
        while (state := report(model).to_dict())["packing_for_later"] or state["packing_in_background"] is not None:
            time.sleep(0.01)
        return found, [(graph["origin"], graph["lossless_bytes"] > 0) for graph in graphs]

    def test_they_read_it_and_write_the_same_text(self, tmp_path):
        """Programs that the first process runs read the model's weights; those that it stores read the file."""
        counters.clear()
        first, graphs = self.run()
        assert graphs == [("traced", False), ("derived", False)]
        assert counters["frames"]["ok"] > 0
        assert [*tmp_path.glob("backbone-*/packed/twins.safetensors")]
        counters.clear()
        later, graphs = self.run()
        assert graphs == [("stored", True)] * 2
        assert counters["frames"]["ok"] == 0
        assert all(map(torch.equal, first, later))
        assert len([*tmp_path.rglob("*.pass")]) == 2

    def test_a_model_of_the_same_shapes_packs_its_own(self, tmp_path):
        self.run()
        first, graphs = self.run(model_of(seed=1))
        assert graphs == [("traced", False), ("derived", False)]
        assert len([*tmp_path.glob("backbone-*/packed/twins.safetensors")]) == 2
        second, graphs = self.run(model_of(seed=1))
        assert graphs == [("stored", True)] * 2
        assert all(map(torch.equal, first, second))
        assert len([*tmp_path.rglob("*.pass")]) == 2

    def test_where_nothing_pays_the_models_weights_stay(self, tmp_path, gains):
        gains({1: 1.0, 4: 1.0, 6: 1.0})
        self.run()
        assert len([*tmp_path.rglob("*.pass")]) == 2
        assert not [*tmp_path.glob("backbone-*")]
        assert self.run()[1] == [("stored", False)] * 2

    def test_after_an_error_on_the_way_the_next_one_reads_16_bits_too(self, tmp_path, monkeypatch):
        """Without the file, programs that read it would pack before the first token; with it they run."""

        def fail(*_):
            raise RuntimeError("no space")

        with monkeypatch.context() as patch:
            patch.setattr(pack, "write_backbone_file", fail)
            first, _ = self.run()
        second, graphs = self.run()
        assert graphs == [("traced", False), ("derived", False)]
        third, graphs = self.run()
        assert graphs == [("stored", True)] * 2
        assert all(map(torch.equal, first, second))
        assert all(map(torch.equal, first, third))
