"""The manual's pictures are as new as the code that draws them, no wider than a page, and all are used."""

import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from tests.support.layout import ROOT
from tools.pictures import method, table
from tools.pictures.__main__ import main

WIDEST = 900  # pixels of a page


def test_no_picture_is_older_than_what_draws_it():
    assert table.stale() == [], "run python -m tools.pictures"


def test_a_changed_source_makes_a_picture_stale_until_it_is_drawn_again(tmp_path, monkeypatch):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "_DIGESTS", tmp_path / "sources.json")
    for module in (table, __import__("tools.pictures.__main__", fromlist=["FOLDER"])):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "docs" / "images")
    drawing = table.Picture(lambda path: path.write_text("drawn"), ("code.py",))
    monkeypatch.setattr(table, "PICTURES", {"one.svg": drawing})
    monkeypatch.setattr("tools.pictures.__main__.PICTURES", table.PICTURES)
    assert table.stale() == ["one.svg"]
    assert main([]) == 0
    assert table.stale() == []
    (tmp_path / "code.py").write_text("2")
    assert table.stale() == ["one.svg"]


@pytest.mark.parametrize("drawing", [method.how_it_works, method.weight_line])
def test_drawings_are_svg_of_a_pages_width_whose_words_lie_inside(drawing):
    picture = ElementTree.fromstring(drawing())
    width, height = int(picture.get("width")), int(picture.get("height"))
    assert width == WIDEST
    for text in picture.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.get("x")) <= width
        assert 0 < float(text.get("y")) <= height


def test_every_picture_is_drawn_by_the_table_or_archived_and_shown_on_a_page():
    shown = {
        name
        for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
        for name in re.findall(r"images/([\w.]+)", page.read_text(encoding="utf-8"))
    }
    files = {file.name for file in table.FOLDER.iterdir() if file.suffix != ".json"}
    assert files == {*table.PICTURES, *table.ARCHIVED}
    assert files == shown


@pytest.mark.parametrize("name", [n for n in (*table.PICTURES, *table.ARCHIVED) if n.endswith(".png")])
def test_pictures_are_no_wider_than_a_page(name):
    with Image.open(table.FOLDER / name) as picture:
        assert picture.width <= WIDEST
