"""The cache of demo models: whole copies are reused, half-written ones never seen.

Conversion itself is replaced by a stub that writes a small folder; the tests on the real model cover it.
"""

import pytest

from tools import demo_models
from tools.demo_models import copy_to


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """Points the cache at an empty folder, stubs the conversion and counts its runs."""
    runs = []

    def convert(title, gguf, folder):
        runs.append(title)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_models, "gguf_path", lambda name: tmp_path / "unused.gguf")
    monkeypatch.setattr(demo_models, "convert", convert)
    return runs


def test_a_whole_copy_is_converted_once(conversions):
    assert demo_models.fetch("smollm2") == demo_models.fetch("smollm2")
    assert len(conversions) == 1


def test_an_interrupted_conversion_leaves_nothing(conversions, tmp_path, monkeypatch):
    def interrupted(title, gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_models, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_models.fetch("smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_first_of_two_concurrent_conversions_stays(conversions, tmp_path, monkeypatch):
    convert = demo_models.convert

    def overtaken(title, gguf, folder):
        monkeypatch.setattr(demo_models, "convert", convert)
        demo_models.fetch("smollm2")
        convert(title, gguf, folder)

    monkeypatch.setattr(demo_models, "convert", overtaken)
    assert demo_models.fetch("smollm2").is_dir()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["smollm2"]


def test_pieces_are_joined_in_order(tmp_path):
    pieces = [tmp_path / str(i) for i in range(3)]
    for i, piece in enumerate(pieces):
        piece.write_bytes(bytes([i]) * 5)
    demo_models._concatenate(pieces, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == bytes([0] * 5 + [1] * 5 + [2] * 5)


def test_copies_go_only_into_new_or_empty_folders(conversions, tmp_path):
    folder = demo_models.fetch("smollm2")
    copy_to(folder, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="not an empty folder"):
        copy_to(folder, tmp_path / "copy")


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"model='smollm3' is unknown; choose one of smollm2, gemma3-270m, "):
        demo_models.fetch("smollm3")
    with pytest.raises(ValueError, match=r"model='/no/such' is neither a folder with a config.json"):
        demo_models.resolve("/no/such")


def test_a_program_without_a_model_ends_with_the_reason():
    """A message is what `sys.exit` prints to the standard error, with exit status 1."""
    with pytest.raises(SystemExit) as end:
        demo_models.load_or_exit("/no/such")
    assert end.value.code.startswith("error: model='/no/such' is neither a folder with a config.json")
