"""Saved twins: the second start quantizes nothing and has the same bits; whatever does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import river_compile.twins.quantize
from river_compile import RiverWarning, report, save_twins
from river_compile.backend import river
from river_compile.compile_cache.tensor_file import write_tensors
from river_compile.errors import TwinsError
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import LAYOUTS, pack, tensors_of
from river_compile.passes.program import Lowering
from river_compile.twins.file import FILE, TwinFile, write_missing
from tests.support.decoding import decode, new_cache
from tests.support.examples import slow
from tests.support.families import make
from tests.support.lowerings import OPERATORS
from tests.support.mappings import lies_in
from tests.support.traced import TracedStep

OPTIONS = {"kernels": OPERATORS, "quantizer": "hqq", "group_size": 32, "first_exit": 1, "threshold": -1.0}


def start_anew(model, **options):
    """Compiles the model again, decodes a token at each depth and returns their logits."""
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, **options})
    return torch.stack(decode(model, new_cache(model, "static"), (1, 0))[1:])


def run(model, depths=(1, 0), family="llama", **options):
    """Does what `start_anew` does with a step that was traced before: all of a start but Dynamo."""
    step = TracedStep(family, model=model)
    executor = step.compiled(**{**OPTIONS, **options})
    return torch.stack([step.call(executor, depth) for depth in depths])


def start(family="llama", seed=0):
    return make(family, layers=2, seed=seed)


@pytest.fixture(scope="module")
def packed():
    """A model whose twins are packed."""
    model = start()
    run(model)
    return model


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory):
    return save_twins(packed, tmp_path_factory.mktemp("saved") / "twins")


@pytest.fixture
def saved(whole, tmp_path):
    """A separate folder of saved twins to damage."""
    return shutil.copytree(whole, tmp_path / "twins")


def contents(folder):
    """Returns tensors, metadata and matrices of a folder of saved twins, to change and write back."""
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    return load_file(folder / FILE), metadata, json.loads(metadata["matrices"])


def write_back(folder, tensors, metadata, matrices=None, **changes):
    """Writes a folder of saved twins by hand, with a hash that is right. Text for `matrices` is written as it is."""
    if matrices is not None:
        changes["matrices"] = matrices if isinstance(matrices, str) else json.dumps(matrices)
    (folder / FILE).unlink()
    write_tensors(folder / FILE, tensors, {**metadata, **changes})


@pytest.mark.core
@pytest.mark.parametrize(("family", "quantizer"), [("llama", "hqq"), ("gpt2", "rtn"), slow("qwen2", "hqq")])
def test_the_second_start_has_the_same_bits_and_quantizes_nothing(family, quantizer, tmp_path, monkeypatch):
    """Packed bytes, SQNR and logits are equal, with merged, transposed and biased matrices; no quantizer is called."""
    first = start(family)
    logits = start_anew(first, quantizer=quantizer)
    save_twins(first, tmp_path / "twins")
    monkeypatch.setattr(river_compile.twins.quantize, "quantize", lambda *_: pytest.fail("a matrix was quantized"))
    second = start(family)
    assert torch.equal(start_anew(second, quantizer=quantizer, twins=tmp_path / "twins"), logits)
    before, after = report(first).packed, report(second).packed
    assert len(after) == len(before) > 0
    for a, b in zip(before, after, strict=True):
        assert (a.name, a.shape, a.group_size, a.sqnr) == (b.name, b.shape, b.group_size, b.sqnr)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        assert (a.folder, b.folder) == ("", str(tmp_path / "twins"))
    assert f"{len(after)} matrices read from {tmp_path / 'twins'}" in str(report(second))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")
@pytest.mark.slow
def test_what_the_kernels_read_is_mapped_and_not_copied(tmp_path):
    """All packed bytes, the head's too; a change of the weights is packed in the process's own pages."""
    kernels, logits, models = Lowering("eager", "native", False), [], []
    for options in ({}, {"twins": tmp_path / "twins"}):
        torch._dynamo.reset()
        model = start()
        model.compile(backend=river, options={**OPTIONS, "kernels": kernels, "lm_head": "w4", **options})
        logits.append(torch.stack(decode(model, new_cache(model, "static"), [1, 0])[1:]))
        models.append(model)
        if not options:
            save_twins(model, tmp_path / "twins")
    assert torch.equal(*logits)
    file = tmp_path / "twins" / FILE
    packed = [site.weight for site in report(models[1]).packed]
    assert {weight.layout for weight in packed} == {"native"}
    for weight in packed:
        for tensor in (weight.qweight, weight.scale_zero):
            assert lies_in(tensor, file)
            assert tensor.data_ptr() % 64 == 0
    assert not any(lies_in(site.weight.qweight, file) for site in report(models[0]).packed)
    before = file.read_bytes()
    with torch.no_grad():
        models[1].model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.warns(RiverWarning, match="weights changed"):
        changed = torch.stack(decode(models[1], new_cache(models[1], "static"), [1, 0])[1:])
    assert not torch.equal(changed, logits[1])
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("n", "k", "group"), [(48, 128, 32), (7, 192, 64)])
def test_every_layout_says_what_its_tensors_are(name, n, k, group):
    torch.manual_seed(0)
    weight = torch.randn(n, k)
    packed = pack(quantize(weight, group, "rtn"), name)
    for part, (shape, dtypes) in tensors_of(name, n, k, group).items():
        tensor = getattr(packed, part)
        assert tensor.shape == shape
        assert tensor.dtype in dtypes
    again = packed.as_layout(name)
    assert again.qweight is packed.qweight
    other = packed.as_layout("plain")
    assert torch.equal(other.dequantize(), packed.dequantize())


class TestMissing:
    """``on_missing_twins="save"``: the first start writes what all later ones map."""

    def test_it_is_made_once_by_those_that_ask_at_once(self, packed, tmp_path):
        folder, calls = tmp_path / "a" / "twins", []

        def make():
            calls.append(None)
            return report(packed).packed

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: write_missing(folder, make), range(4)))
        assert len(calls) == 1
        assert TwinFile(folder).folder == folder

    def test_what_is_made_is_read(self, tmp_path):
        model = start()
        logits = run(model, twins=tmp_path / "twins", on_missing_twins="save")
        assert torch.equal(logits, run(start()))
        assert {site.folder for site in report(model).packed} == {str(tmp_path / "twins")}

    def test_it_holds_the_blocks_that_this_start_does_not_need(self, tmp_path):
        run(start(), depths=[1], twins=tmp_path / "twins", on_missing_twins="save", exit_depth=1)
        logits = run(start(), depths=[0], twins=tmp_path / "twins", exit_depth=0)
        assert torch.equal(logits, run(start(), depths=[0], exit_depth=0))

    def test_one_that_is_there_is_used_or_refused(self, saved):
        file = saved / FILE
        before = file.stat().st_mtime_ns
        run(start(), twins=saved, on_missing_twins="save")
        with pytest.raises(TwinsError, match="made from other weights"):
            run(start(seed=1), twins=saved, on_missing_twins="save")
        assert file.stat().st_mtime_ns == before

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(TwinsError, match=r"Cannot save to .*file/twins: .*(Not a directory|File exists)"):
            run(start(), twins=tmp_path / "file" / "twins", on_missing_twins="save")


def test_what_is_stored_is_no_longer_than_the_grid(saved):
    """Half a byte for each weight and two bfloat16 numbers for each group, plus the file's header."""
    assert [file.name for file in saved.iterdir()] == [FILE]
    weights = sum(n * k for n, k in (matrix["shape"] for matrix in contents(saved)[2]))
    assert (saved / FILE).stat().st_size < weights / 2 + weights / 32 * 4 + 12_000


def test_other_weights_are_refused(saved):
    """One changed number in one matrix is seen, and no matrix of the artifact is used."""
    other = start()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    with pytest.raises(TwinsError, match=rf"{FILE}: model.layers.1.mlp.down_proj was made from other weights"):
        run(other, twins=saved)
    assert report(other).packed == []


def test_an_artifact_of_another_model_is_refused(saved):
    with pytest.raises(TwinsError, match=r"it holds a matrix model.layers.0.* which this model does not have. Name th"):
        run(start("gpt2"), family="gpt2", twins=saved)


def test_an_artifact_that_lacks_a_matrix_is_refused(saved):
    tensors, metadata, matrices = contents(saved)
    gone = matrices.pop()["name"]
    write_back(saved, {k: t for k, t in tensors.items() if gone not in k}, metadata, matrices)
    with pytest.raises(TwinsError, match=r"it holds no matrix model.layers.* saved with an exit_depth that leaves"):
        run(start(), twins=saved)


@pytest.mark.parametrize("changed", [{"group_size": 64}, {"quantizer": "rtn"}])
def test_other_ways_to_quantize_are_refused(saved, changed):
    with pytest.raises(TwinsError, match="was made with quantizer='hqq' group_size=32, and the options are quantizer="):
        run(start(), twins=saved, **changed)


def test_another_version_is_refused(saved):
    tensors, metadata, _ = contents(saved)
    write_back(saved, tensors, metadata, version="7")
    with pytest.raises(TwinsError, match=rf"{FILE}: it has version 7, and this release reads 8. Save"):
        run(start(), twins=saved)


def test_version_2_with_its_two_files_is_refused(saved):
    save_file(load_file(saved / FILE), saved / FILE)
    (saved / "river.json").write_text(json.dumps({"format": "river-twins", "version": 2}))
    with pytest.raises(TwinsError, match=r"river.json: it has version 2, and this release reads 8. Save"):
        TwinFile(saved)


@pytest.mark.parametrize("keep", [0, 1, 200, -2])
def test_a_truncated_file_is_refused(saved, keep):
    file = saved / FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TwinsError, match=rf"{FILE}: it is damaged .*Save the twins again"):
        TwinFile(saved)


def test_one_changed_bit_is_refused_wherever_it_is(saved):
    """In the header's length, the header (the hash that it states included) and the tensors."""
    file = saved / FILE
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    stated = content.index(b'"xxh3":"') + 10
    for position in (0, 7, 8, 40, stated, *range(100, header, 97), header - 1, header, len(content) // 2, -1):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(TwinsError, match=rf"{FILE}: it (is damaged|holds no saved twins|has version)"):
            TwinFile(saved)
    file.write_bytes(content)
    assert TwinFile(saved).folder == saved


def test_nothing_of_a_damaged_artifact_is_used(saved):
    content = bytearray((saved / FILE).read_bytes())
    content[-1] ^= 1
    (saved / FILE).write_bytes(content)
    other = start()
    with pytest.raises(TwinsError, match=rf"{FILE}: it is damaged \(its hash differs"):
        run(other, twins=saved)
    assert report(other).packed == []


def test_a_missing_file_is_named(saved):
    (saved / FILE).unlink()
    with pytest.raises(
        TwinsError, match=rf"{FILE}: no such file. Set twins= to a folder that river_compile.save_twins wrote"
    ):
        TwinFile(saved)


def test_safetensors_of_something_else_are_refused(saved):
    save_file({"weight": torch.zeros(2)}, saved / FILE, {"format": "pt"})
    with pytest.raises(TwinsError, match=rf"{FILE}: it holds no saved twins"):
        TwinFile(saved)


class TestEdited:
    """A file that was edited, its hash made right again, is refused by name before a kernel reads it."""

    KEY = "model.layers.0.mlp.down_proj/hqq/32"

    @pytest.mark.parametrize(
        ("part", "change", "words"),
        [
            ("qweight", lambda t: t[:-1], r"down_proj/hqq/32.qweight is torch.uint8 \(.*\), and a matrix of shape"),
            ("qweight", lambda t: t.to(torch.int32), r"down_proj/hqq/32.qweight is torch.int32"),
            ("scale_zero", lambda t: t[:, :-1].contiguous(), r"down_proj/hqq/32.scale_zero is torch.bfloat16"),
            ("scale_zero", lambda t: t.half(), r"down_proj/hqq/32.scale_zero is torch.float16"),
            ("scale_zero", lambda t: None, r"down_proj/hqq/32.scale_zero is missing"),
            ("input_scale", lambda t: torch.ones(3), r"down_proj/hqq/32.input_scale is torch.float32 \(3,\)"),
            ("zero", lambda t: torch.ones(3), r"down_proj/hqq/32.zero belongs to no matrix"),
        ],
    )
    def test_tensors(self, saved, part, change, words):
        tensors, metadata, _ = contents(saved)
        name = f"{self.KEY}.{part}"
        tensors[name] = change(tensors.get(name))
        write_back(saved, {name: t for name, t in tensors.items() if t is not None}, metadata)
        with pytest.raises(TwinsError, match=rf"{FILE}: .*{words}.*Save the twins again"):
            run(start(), twins=saved)

    @pytest.mark.parametrize(
        "changes",
        [
            {"shape": [64]},
            {"shape": [0, 64]},
            {"group_size": 48},
            {"group_size": "32"},
            {"sqnr": None},
            {"sqnr": "good"},
            {"color": "red"},
            {"quantizer": ["hqq"]},
            {"shape": [64, 1e400]},
            {"experts": 3},
            {"experts": -1},
            {"layout": "rows"},
            {"layout": ["plain"]},
        ],
    )
    def test_matrices(self, saved, changes):
        tensors, metadata, matrices = contents(saved)
        write_back(saved, tensors, metadata, [matrices[0] | changes, *matrices[1:]])
        with pytest.raises(TwinsError, match=rf"{FILE}: its list of matrices is wrong"):
            TwinFile(saved)

    def test_a_list_nested_beyond_reading(self, saved):
        tensors, metadata, _ = contents(saved)
        write_back(saved, tensors, metadata, matrices="[" * 100_000)
        with pytest.raises(TwinsError, match=rf"{FILE}: its list of matrices is wrong"):
            TwinFile(saved)

    def test_a_matrix_that_is_listed_twice(self, saved):
        """The second entry would decide."""
        tensors, metadata, matrices = contents(saved)
        write_back(saved, tensors, metadata, [*matrices, {**matrices[0], "sqnr": "1.0"}])
        with pytest.raises(TwinsError, match=r"/hqq/32 is in its list of matrices twice. Save the twins again"):
            TwinFile(saved)

    def test_a_matrix_that_the_model_does_not_have(self, saved):
        """As of a model with more blocks, whose first ones are this model's."""
        tensors, metadata, matrices = contents(saved)
        name = matrices[0]["name"].replace("layers.0", "layers.7").replace("layers.1", "layers.7")
        tensors |= {
            k.replace(matrices[0]["name"], name): t.clone() for k, t in tensors.items() if matrices[0]["name"] in k
        }
        write_back(saved, tensors, metadata, [*matrices, {**matrices[0], "name": name}])
        with pytest.raises(TwinsError, match=r"holds a matrix model.layers.7.*, which this model does not have. Name"):
            run(start(), twins=saved)

    def test_values_that_are_no_numbers(self, saved):
        tensors, metadata, _ = contents(saved)
        tensors[f"{self.KEY}.scale_zero"][3, 0, 0] = torch.nan
        write_back(saved, tensors, metadata)
        with pytest.raises(TwinsError, match=r"down_proj/hqq/32.scale_zero holds infinite or NaN values. Save"):
            TwinFile(saved)

    def test_a_matrix_of_another_shape_with_tensors_to_fit(self, saved):
        tensors, metadata, matrices = contents(saved)
        (matrix,) = (m for m in matrices if f"{m['name']}/hqq/32" == self.KEY)
        matrix["shape"][0] -= 16
        tensors |= {name: t[:-16].contiguous() for name, t in tensors.items() if name.startswith(self.KEY)}
        write_back(saved, tensors, metadata, matrices)
        with pytest.raises(TwinsError, match=r"down_proj was made from other weights"):
            run(start(), twins=saved)

    def test_an_input_scale_that_no_twin_applies(self, saved):
        tensors, metadata, matrices = contents(saved)
        (matrix,) = (m for m in matrices if f"{m['name']}/hqq/32" == self.KEY)
        tensors[f"{self.KEY}.input_scale"] = torch.ones(matrix["shape"][1])
        write_back(saved, tensors, metadata)
        with pytest.raises(TwinsError, match=r"down_proj has an input_scale that its twin does not apply"):
            run(start(), twins=saved)


def test_a_model_without_twins_cannot_be_saved(tmp_path):
    with pytest.raises(TwinsError, match="this model has no twins"):
        save_twins(start(), tmp_path / "twins")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
def test_weights_that_changed_since_are_not_saved(tmp_path):
    """The twins are of the old ones until the model runs again."""
    model = start()
    run(model)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(2)
    stale = r"the weights of .*up_proj changed after they were quantized. Call river_compile.requantize\(model\)"
    with pytest.raises(TwinsError, match=stale):
        save_twins(model, tmp_path / "twins")
    logits = run(model)
    folder = save_twins(model, tmp_path / "twins")
    assert torch.equal(run(model, twins=folder), logits)
    layer.weight = torch.nn.Parameter(layer.weight.detach() / 2)
    with pytest.raises(TwinsError, match=stale):
        save_twins(model, tmp_path / "later")


def test_layers_that_are_gone_are_not_saved(tmp_path):
    """As those of an adapter that was merged: a folder of saved twins with their names would fit no model."""
    model = start()
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(down)
    start_anew(model)
    model.model.layers[1].mlp.down_proj = down
    start_anew(model)
    folder = save_twins(model, tmp_path / "twins")
    assert not any("down_proj.0" in matrix["name"] for matrix in contents(folder)[2])


class TestFolder:
    """The target appears whole or not at all, and nothing that is there is overwritten."""

    def test_an_existing_folder_stays_as_it_is(self, packed, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(TwinsError, match="it exists and is not an empty folder"):
            save_twins(packed, tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_empty_folder_and_missing_parents_are_fine(self, packed, tmp_path):
        empty = tmp_path / "empty"
        empty.mkdir()
        assert TwinFile(save_twins(packed, empty)).folder == empty
        assert TwinFile(save_twins(packed, tmp_path / "a" / "b")).folder.is_dir()

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("", r"folder='' is not allowed; it must be a path"),
            ("a\0b", r"folder='a\\x00b' is not allowed; it must be a path"),
            (7, r"folder=7 is not allowed; it must be a path"),
            ("x" * 300, "Cannot save to x*: .*File name too long"),
            ("\ud800", "Cannot save to .*surrogates not allowed"),
            ("/proc/twins", "Cannot save to /proc/twins: .*No such file or directory"),
        ],
    )
    def test_names_that_no_folder_can_have(self, packed, tmp_path, monkeypatch, name, words):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(TwinsError, match=words):
            save_twins(packed, name)
        assert list(tmp_path.iterdir()) == []

    def test_a_place_that_may_only_be_read(self, packed, tmp_path, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("pathlib.Path.iterdir", refuse)
        with pytest.raises(TwinsError, match=r"Cannot save to .*Permission denied"):
            save_twins(packed, tmp_path)

    def test_a_disk_that_fills_up_leaves_nothing(self, packed, tmp_path, monkeypatch):
        def full(file, tensors, metadata):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("river_compile.twins.file.write_tensors", full)
        with pytest.raises(TwinsError, match="No space left on device"):
            save_twins(packed, tmp_path / "twins")
        assert list(tmp_path.iterdir()) == []
