"""A backbone whose weights are packed in 12 bits: the text and the scores of the one in 16 bits, to the bit."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import river_compile
from river_compile import RiverWarning, choices, report
from river_compile.errors import OptionError
from river_compile.kernels.native import load as native
from river_compile.kernels.native.build import choose_isa
from river_compile.kernels.quant import lossless
from river_compile.twins import making, pack
from tests.support.families import each, make, prompt

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


@pytest.mark.parametrize("family", each(("llama", "qwen2", "gemma2", "phi3", "gpt_neox", "mixtral"), ["llama"]))
def test_texts_and_scores_are_those_of_weights_in_16_bits(family):
    """With biases, merged and gated products, tied and untied heads; where experts stay in 16 bits too."""
    packed, plain = accelerated(model_of(family), "12bit"), accelerated(model_of(family), "model")
    assert_alike(packed, plain)
    assert all(map(torch.equal, generate(packed, 3), generate(plain, 3)))
    sizes = [graph["lossless_bytes"] for graph in report(packed).to_dict()["graphs"]]
    assert all(sizes)
    assert "MB of weights, packed without loss" in str(report(packed))
    assert all(graph["lossless_bytes"] == 0 for graph in report(plain).to_dict()["graphs"])


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
    hashed, digest = [], pack.digest_of
    monkeypatch.setattr(pack, "digest_of", lambda some: hashed.extend(map(id, some)) or digest(some))
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


@pytest.mark.parametrize(
    ("gains", "exact", "fast"),
    [
        ({1: 1.3, 4: 1.2, 8: 1.0}, True, True), ({1: 1.3, 4: 0.8, 8: 0.8}, False, True),
        ({1: 1.0, 4: 1.4, 8: 1.4}, True, False), ({}, False, False),
    ],
)  # fmt: skip
def test_matrices_are_packed_where_that_was_measured_to_pay(monkeypatch, gains, exact, fast):
    monkeypatch.setattr(lossless, "_SMALL", 0)
    monkeypatch.setattr(lossless, "speedups_12bit", lambda n, k: gains)
    lossless.pays_12bit.cache_clear()
    try:
        assert {found > 0 for found in packed_by_default()} == {exact}
        assert {found > 0 for found in packed_by_default("fast")} == {fast}
    finally:
        lossless.pays_12bit.cache_clear()


def test_each_matrix_is_measured_for_itself(monkeypatch):
    """Here the MLP's pay, which are larger than attention's."""
    monkeypatch.setattr(lossless, "_SMALL", 0)
    monkeypatch.setattr(lossless, "speedups_12bit", lambda n, k: {1: 1.0 + (n * k >= 8192), 4: 1.0, 8: 1.0})
    lossless.pays_12bit.cache_clear()
    try:
        some = packed_by_default()
    finally:
        lossless.pays_12bit.cache_clear()
    every = accelerated(model_of(), "12bit")
    generate(every)
    for packed, graph in zip(some, report(every).to_dict()["graphs"], strict=True):
        assert 0 < packed < graph["lossless_bytes"]


def test_small_matrices_and_models_without_room_stay_in_16_bits(monkeypatch):
    monkeypatch.setattr(lossless, "speedups_12bit", lambda n, k: {1: 2.0, 4: 2.0, 8: 2.0})
    assert set(packed_by_default()) == {0}
    monkeypatch.setattr(lossless, "_SMALL", 0)
    monkeypatch.setattr(choices, "_memory", lambda: 1000)
    lossless.pays_12bit.cache_clear()
    try:
        assert set(packed_by_default()) == {0}
    finally:
        lossless.pays_12bit.cache_clear()


def test_of_a_large_matrix_some_rows_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(lossless, "speedups_12bit", lambda n, k: measured.append((n, k)) or {1: 2.0})
    lossless.pays_12bit.cache_clear()
    try:
        assert lossless.pays_12bit(128_256, 4096, many_rows=False)
    finally:
        lossless.pays_12bit.cache_clear()
    assert measured == [(2048, 4096)]


def test_what_was_measured_is_kept_for_the_machine(monkeypatch, tmp_path):
    native.load()
    library = lossless.kernels_library(choose_isa())
    monkeypatch.setattr(lossless, "kernels_library", lambda isa: library)  # (another home has none)
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    monkeypatch.setattr(lossless, "_MEASURED_BYTES", 1 << 16)
    lossless.speedups_12bit.cache_clear()
    try:
        first = lossless.speedups_12bit(64, 128)
        (file,) = tmp_path.rglob("*64x128.json")
        assert first.keys() == {1, 4, 8}
        file.write_text('{"1": 3.0, "4": 2.0, "8": 1.0}')
        lossless.speedups_12bit.cache_clear()
        assert lossless.speedups_12bit(64, 128) == {1: 3.0, 4: 2.0, 8: 1.0}
        file.write_text("{")
        lossless.speedups_12bit.cache_clear()
        assert lossless.speedups_12bit(64, 128).keys() == {1, 4, 8}
    finally:
        lossless.speedups_12bit.cache_clear()


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
        ({"kernels": "eager"}, torch.bfloat16, "requires the C.. kernels on a CPU"),
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
    def everything_pays(self, monkeypatch, tmp_path):
        monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
        for module in (lossless, pack):
            monkeypatch.setattr(module, "_SMALL", 0)
        monkeypatch.setattr(lossless, "speedups_12bit", lambda n, k: {1: 2.0, 4: 2.0, 8: 2.0})
        lossless.pays_12bit.cache_clear()
        yield
        lossless.pays_12bit.cache_clear()

    def run(self, model=None):
        """Generates with a model as a new process would; returns texts and scores, and origins and bytes."""
        model = accelerated(model or model_of(), "auto")
        found = generate(model)
        graphs = report(model).to_dict()["graphs"]
        while (state := report(model).to_dict())["packing_for_later"] or state["packing_in_background"] is not None:
            time.sleep(0.01)
        return found, [(graph["origin"], graph["lossless_bytes"] > 0) for graph in graphs]

    def test_they_read_it_and_write_the_same_text(self, tmp_path):
        first, graphs = self.run()
        assert graphs == [("traced", False), ("derived", False)]
        assert [*tmp_path.glob("backbone-*/packed/twins.safetensors")]
        second, graphs = self.run()
        assert graphs == [("stored", True)] * 2
        assert all(map(torch.equal, first, second))

    def test_a_model_of_the_same_shapes_packs_its_own(self, tmp_path):
        self.run()
        tuned = model_of(seed=1)
        first, graphs = self.run(tuned)
        assert graphs == [("traced", False), ("derived", False)]
        assert len([*tmp_path.glob("backbone-*/packed/twins.safetensors")]) == 2
        second, graphs = self.run(model_of(seed=1))
        assert graphs == [("stored", True)] * 2
        assert all(map(torch.equal, first, second))

    def test_programs_are_stored_when_it_is_known_which(self, tmp_path, monkeypatch):
        release, make_weight = threading.Event(), making.make_weight
        monkeypatch.setattr(making, "make_weight", lambda *args: (release.wait(60), make_weight(*args))[1])
        model = accelerated(model_of(), "auto")
        generate(model)
        assert not [*tmp_path.rglob("*.pass")]
        release.set()
        while report(model).to_dict()["packing_for_later"] or not [*tmp_path.rglob("*.pass")]:
            time.sleep(0.01)
        assert len([*tmp_path.rglob("*.pass")]) == 2

    def test_where_nothing_pays_the_models_weights_stay(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lossless, "speedups_12bit", lambda n, k: {1: 1.0, 4: 1.0, 8: 1.0})
        self.run()
        assert len([*tmp_path.rglob("*.pass")]) == 2
        assert not [*tmp_path.glob("backbone-*")]
        assert self.run()[1] == [("stored", False)] * 2

    def test_an_error_on_the_way_leaves_the_program_that_ran(self, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("no space")

        monkeypatch.setattr(pack.TwinWeights, "store_lossless", fail)
        first, _ = self.run()
        second, graphs = self.run()
        assert graphs == [("stored", False)] * 2
        assert all(map(torch.equal, first, second))
