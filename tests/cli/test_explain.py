"""The page of `river explain`: whole, alone, and as a browser shows it."""

import html.parser
import re
import shutil
import subprocess

import pytest

from river_compile.cli import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Notes what a page refers to, its ids, its text, and elements that are not closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self):
        super().__init__()
        self.refers, self.ids, self.text, self.open, self.titles = [], [], "", [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.refers += [named[a] for a in ("src", "href") if a in named]
        self.ids += [named["id"]] if "id" in named else []
        self.titles += [named["title"]] if "title" in named else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "river.html", tiny


@pytest.fixture
def file(written, capsys):
    path, model = written
    if not path.exists():
        assert app.main(["explain", model, "-o", str(path), "--new-tokens", "8", "--prompt", "<hello>"]) == 0
        assert str(path) in capsys.readouterr().out.replace("\n", "")
    return path


def test_the_page_is_whole_and_needs_nothing_else(file):
    page = Page()
    page.feed(file.read_text())
    assert page.open == []
    assert page.refers == []
    assert {"text", "exits", "report", "decode_1", "prefill_1"} <= set(page.ids)
    assert len(page.titles) == 8
    assert page.titles[0] == "3 of 3 layers"
    assert "<hello>" in page.text
    assert "layer 3 and its twin" in page.text
    assert "pass 1_twin_layers" in page.text
    assert "4-bit matmul 0: model.layers.2" in page.text


def test_the_page_names_no_folder_of_the_machine(file):
    text = file.read_text()
    assert "# File: transformers/" in text
    assert "/site-packages/" not in text


def test_the_columns_of_the_plan_are_aligned(file):
    page = Page()
    page.feed(file.read_text())
    header, *rows = (line for line in page.text.split("\n") if re.match(r"layer +hidden|model\.layers\.\d+ ", line))
    start = header.index("KV cache")
    assert len(rows) >= 3
    assert all(row[start - 1] == " " and row[start:].startswith("static ") for row in rows if row != header)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page(file, tmp_path):
    """A screenshot has the page's size and more than a blank page's colors."""
    from PIL import Image

    picture = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900"]
    subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", file.as_uri()],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    shown = Image.open(picture).convert("RGB")
    assert shown.size == (1000, 900)
    assert len(shown.getcolors(maxcolors=1 << 24)) > 50
