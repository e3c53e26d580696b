"""Saved twins: the second start quantizes nothing and has the same bits; whatever does not fit is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import river_compile.twins.make
from river_compile import ArtifactError, OptionError, report, river, save
from river_compile.twins.artifact import MANIFEST, TENSORS, Artifact
from tests.support.decoding import decode, new_cache
from tests.support.families import make

OPTIONS = {"lowering": "eager", "quantizer": "hqq", "group_size": 32, "first_exit": 1, "threshold": -1.0}


def run(model, **options):
    """Compiles the model afresh, decodes two tokens and returns their logits."""
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, **options})
    return torch.stack(decode(model, new_cache(model, "static"), [1, 0])[1:])


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
    return save(packed, tmp_path_factory.mktemp("saved") / "twins")


@pytest.fixture
def saved(whole, tmp_path):
    """An artifact of one's own to damage."""
    return shutil.copytree(whole, tmp_path / "twins")


def rewrite_manifest(folder, **changes):
    file = folder / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("family", "quantizer"), [("llama", "hqq"), ("gpt2", "rtn"), ("qwen2", "hqq")])
def test_the_second_start_has_the_same_bits_and_quantizes_nothing(family, quantizer, tmp_path, monkeypatch):
    """Packed bytes, SQNR and logits are equal, with merged, transposed and biased matrices; no quantizer is called."""
    first = start(family)
    logits = run(first, quantizer=quantizer)
    save(first, tmp_path / "twins")
    monkeypatch.setattr(river_compile.twins.make, "quantize", lambda *_: pytest.fail("a matrix was quantized"))
    second = start(family)
    assert torch.equal(run(second, quantizer=quantizer, artifact=tmp_path / "twins"), logits)
    before, after = report(first).packed, report(second).packed
    assert len(after) == len(before) > 0
    for a, b in zip(before, after, strict=True):
        assert (a.name, a.shape, a.group_size, a.sqnr) == (b.name, b.shape, b.group_size, b.sqnr)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        assert (a.artifact, b.artifact) == ("", str(tmp_path / "twins"))
    assert f"{len(after)} matrices read from {tmp_path / 'twins'}" in str(report(second))


def test_what_is_stored_is_no_longer_than_the_grid(saved):
    """Half a byte for each weight and two bfloat16 numbers for each group, plus the file's header."""
    weights = sum(n * k for n, k in (m["shape"] for m in json.loads((saved / MANIFEST).read_text())["matrices"]))
    assert (saved / TENSORS).stat().st_size < weights / 2 + weights / 32 * 4 + 10_000


def test_other_weights_are_refused(saved):
    """One changed number in one matrix is seen, and no matrix of the artifact is used."""
    other = start()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}: model.layers.1.mlp.down_proj was made from other weights"):
        run(other, artifact=saved)
    assert report(other).packed == ()


def test_an_artifact_of_another_model_is_refused(saved):
    with pytest.raises(ArtifactError, match=r"it holds no matrix transformer.h.0.attn.c_attn; it is another model's"):
        run(start("gpt2"), artifact=saved)


@pytest.mark.parametrize("changed", [{"group_size": 64}, {"quantizer": "rtn"}])
def test_other_ways_to_quantize_are_refused(saved, changed):
    with pytest.raises(ArtifactError, match="was made with quantizer='hqq' group_size=32, and quantizer="):
        run(start(), artifact=saved, **changed)


def test_another_version_is_refused(saved):
    rewrite_manifest(saved, version=1)
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}: it has version 1, this release reads 2"):
        run(start(), artifact=saved)


def test_a_manifest_that_was_edited_is_refused(saved):
    rewrite_manifest(saved, matrices=[])
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}: it is damaged \(its hash differs"):
        Artifact(saved)


@pytest.mark.parametrize("keep", [0, 1, 200, -2])
def test_a_truncated_manifest_is_refused(saved, keep):
    file = saved / MANIFEST
    file.write_text(file.read_text()[:keep])
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}: it is damaged"):
        Artifact(saved)


@pytest.mark.parametrize("position", [0, 40, -1])
def test_one_changed_bit_of_the_tensors_is_refused(saved, position):
    file = saved / TENSORS
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    other = start()
    with pytest.raises(ArtifactError, match=rf"{TENSORS}: it is damaged \(other bytes"):
        run(other, artifact=saved)
    assert report(other).packed == ()


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: .*No such file"):
        Artifact(saved)


def test_json_of_something_else_is_refused(saved):
    (saved / MANIFEST).write_text('{"weight_map": {}}')
    with pytest.raises(ArtifactError, match="it is no manifest of saved twins"):
        Artifact(saved)


def test_a_model_without_twins_cannot_be_saved(tmp_path):
    with pytest.raises(ArtifactError, match="no twin of this model is packed; generate a token"):
        save(start(), tmp_path / "twins")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_changed_since_cannot_be_saved(tmp_path):
    """After they are packed again, they can."""
    model = start()
    run(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ArtifactError, match=r"the weights of .*layers.0.mlp.up_proj.* changed after they were packed"):
        save(model, tmp_path / "twins")
    run(model)
    assert save(model, tmp_path / "twins").is_dir()


class TestFolder:
    """The target appears whole or not at all, and nothing that is there is overwritten."""

    def test_an_existing_folder_stays_as_it_is(self, packed, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match="it exists and is no empty folder"):
            save(packed, tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_empty_folder_and_missing_parents_are_fine(self, packed, tmp_path):
        empty = tmp_path / "empty"
        empty.mkdir()
        assert Artifact(save(packed, empty)).folder == empty
        assert Artifact(save(packed, tmp_path / "a" / "b")).folder.is_dir()

    def test_a_place_that_cannot_be_written(self, packed, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match=r"cannot save to .*file/twins: .*(Not a directory|File exists)"):
            save(packed, tmp_path / "file" / "twins")

    def test_a_disk_that_fills_up_leaves_nothing(self, packed, tmp_path, monkeypatch):
        def full(tensors, file):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("river_compile.twins.artifact.save_file", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            save(packed, tmp_path / "twins")
        assert list(tmp_path.iterdir()) == []


def test_an_artifact_needs_a_quantizer():
    with pytest.raises(OptionError, match="artifact= holds 4-bit twins, which quantizer='none' does not use"):
        run(start(), artifact="anywhere", quantizer="none")
