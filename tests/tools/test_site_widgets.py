"""The site in a headless Chromium: its widgets work, pages fit their window, and nothing comes from elsewhere."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from river_compile.reporting import predict
from tests.support.layout import ROOT
from tools import site_widgets

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds the site once and returns its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def seen(site, page, code, width=1280):
    """Runs JavaScript on a page after its own scripts, at a window's width; returns what it returns."""
    path = site / page
    probe = path.with_name(f"probe-{path.name}")
    script = f"document.body.dataset.seen = JSON.stringify((() => {{ {code} }})());"
    text = path.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    probe.write_text(text, encoding="utf-8")
    # (Chromium's windows are at least 500 pixels wide: a frame has any width.)
    frame = probe.with_name(f"frame-{path.name}")
    frame.write_text(
        f'<iframe id="f" src="{probe.name}" width="{width}" height="800"></iframe><script>onload = () => '
        "document.body.dataset.seen = f.contentDocument.body.dataset.seen</script>"
    )
    found = dumped(site, frame, milliseconds=10000)
    probe.unlink()
    frame.unlink()
    return found


def dumped(site, page, milliseconds):
    """Opens a page in the browser and returns what its scripts left in the body's `data-seen`."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command += [f"--virtual-time-budget={milliseconds}", f"--user-data-dir={site.parent / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'data-seen="([^"]+)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(html.unescape(found[1]))


# Loads every page in frames of two widths, one after the other.
MEASURE = """
    document.body.dataset.seen = "";
    (async () => {
        const found = {};
        for (const page of PAGES) for (const width of [1280, 390]) {
            const frame = document.createElement("iframe");
            Object.assign(frame, { width, height: 800, src: page });
            document.body.append(frame);
            await new Promise((done) => { frame.onload = done; });
            const inside = frame.contentDocument;
            const images = [...inside.images];
            found[`${page} ${width}`] = {
                width,
                needed: inside.documentElement.scrollWidth,
                wide: [...inside.querySelectorAll("table[data-rows]")].filter((table) =>
                    table.getBoundingClientRect().right > table.closest("article").getBoundingClientRect().right + 1)
                    .map((table) => table.textContent.slice(0, 80)),
                unnamed: images.filter((image) => !image.alt).map((image) => image.src),
                broken: images.filter((image) => image.complete && !image.naturalWidth).map((image) => image.src),
                unreadable: images.filter((image) => image.width && image.width < 600).map((image) => image.src),
            };
            frame.remove();
        }
        document.body.dataset.seen = JSON.stringify(found);
    })();
"""


@needs_browser
def test_pages_and_tables_of_words_fit_their_window_and_pictures_can_be_read(site):
    pages = sorted(str(p.relative_to(site)) for p in site.rglob("*.html") if "assets" not in p.parts)
    harness = site / "all.html"
    script = MEASURE.replace("PAGES", json.dumps([page for page in pages if page != "404.html"]))
    harness.write_text(f"<body><script>{script}</script></body>", encoding="utf-8")
    found = dumped(site, harness, milliseconds=60000)
    harness.unlink()
    assert len(found) > 60
    for page, facts in found.items():
        assert facts["needed"] <= facts["width"], page
        assert not facts["unnamed"] + facts["broken"] + facts["unreadable"] + facts["wide"], (page, facts)


@needs_browser
def test_the_calculator_predicts_what_river_check_does(site):
    code = """
        const root = document.querySelector(".river-calculator");
        root.querySelector("select").value = "llama-3.1-8b";
        root.querySelector("input").value = 80;
        root.querySelector("input").dispatchEvent(new Event("input"));
        return [...root.querySelectorAll("tbody tr")].map((row) => [...row.children].map((cell) => cell.textContent));
    """
    rows = seen(site, "guides/machines.html", code)
    shape = site_widgets.calculator()["shapes"]["llama-3.1-8b"]
    speeds = predict.tokens_per_s(shape["bytes"], 80e9)
    assert [float(row[1]) for row in rows] == pytest.approx([*speeds.values()], rel=0.05)
    assert float(rows[1][2]) == pytest.approx(shape["memory"] / 1e9, rel=0.05)


@needs_browser
def test_the_slider_shows_depth_and_kl_of_each_threshold(site):
    code = """
        const root = document.querySelector(".river-slider");
        const facts = () => root.querySelector(".river-facts").textContent;
        const color = () => getComputedStyle(root.querySelector("span")).borderBottomColor;
        const before = [facts(), color()];
        root.querySelector("input").value = 8;
        root.querySelector("input").dispatchEvent(new Event("input"));
        return [before, [facts(), color()], root.querySelectorAll("span").length];
    """
    (first, orange), (last, blue), tokens = seen(site, "how-it-works.html", code)
    data = site_widgets.slider()
    assert len(data["states"]) == 9
    assert tokens == len(data["texts"])
    assert first.startswith("all exit: 2.0 of 30 layers")
    assert last.startswith("none exits: 30.0 of 30 layers in 16 bits, KL 0.000")
    assert orange != blue


@needs_browser
def test_the_filter_leaves_the_rows_that_contain_all_words(site):
    code = """
        const root = document.querySelector(".river-filter");
        const shown = () => [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden)
            .map((row) => row.textContent.toLowerCase());
        const all = shown().length;
        root.querySelector("input").value = "qwen3 moe";
        root.querySelector("input").dispatchEvent(new Event("input"));
        return [all, shown()];
    """
    all_rows, left = seen(site, "models.html", code)
    assert 0 < len(left) < all_rows
    assert all("qwen3" in row and "moe" in row for row in left)


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|icon|preload)"[^>]* href="([^"]+)"', text)
        outside = [address for address in loaded if re.match(r"(?:https?:)?//", address)]
        assert not outside, f"{page.relative_to(site)}: {outside}"


def test_an_unknown_widget_is_an_error_and_data_cannot_end_their_script(monkeypatch):
    with pytest.raises(KeyError):
        site_widgets.with_widgets("<!-- widget: none -->")
    monkeypatch.setitem(site_widgets.WIDGETS, "slider", lambda: {"text": "</script><b>"})
    assert site_widgets.with_widgets("<!-- widget: slider -->").count("</script>") == 1
