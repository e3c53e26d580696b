"""An animated SVG: each piece of text is shown in its frames and in no other, and nothing is asked of elsewhere."""

import re
from xml.etree import ElementTree

import pytest
from rich.table import Table
from rich.text import Text

from tools.recording import animated_svg

SVG = "{http://www.w3.org/2000/svg}"


def frame(text, style=""):
    table = Table(box=None)
    table.add_column("title", width=20, header_style="bold green")
    table.add_row(Text(text, style))
    return table


@pytest.fixture
def recorded():
    return animated_svg([(0.0, frame("one")), (1.0, frame("two & <2>", "reverse")), (3.0, frame("one"))], 40, "a", 5.0)


def group_of(root, text):
    groups = (group for group in root.iter(f"{SVG}g") if any(part.text == text for part in group.findall(f"{SVG}text")))
    return next(groups)


def test_every_piece_is_shown_in_its_frames(recorded):
    """Eight seconds: the first text to 12.5 % and from 37.5 % on, the second between; the title always."""
    root = ElementTree.fromstring(recorded)
    one, two = group_of(root, "one"), group_of(root, "two\N{NO-BREAK SPACE}&\N{NO-BREAK SPACE}<2>")
    shows = dict(re.findall(r"@keyframes (\w+)\{(.*?\})\}", recorded))
    assert shows[one.get("class")] == "0%{visibility:visible}12.5%{visibility:hidden}37.5%{visibility:visible}"
    assert shows[two.get("class")] == "0%{visibility:hidden}12.5%{visibility:visible}37.5%{visibility:hidden}"
    assert f"{one.get('class')} 8s step-end infinite" in recorded
    assert group_of(root, "title").get("class") is None


def test_without_animation_the_last_frame_is_shown(recorded):
    root = ElementTree.fromstring(recorded)
    assert group_of(root, "one").get("visibility") is None
    assert group_of(root, "two\N{NO-BREAK SPACE}&\N{NO-BREAK SPACE}<2>").get("visibility") == "hidden"
    animations = recorded.partition("prefers-reduced-motion:no-preference")
    assert "animation" not in animations[0]
    assert "animation" in animations[2]


def test_nothing_is_fetched_or_run(recorded):
    assert "<script" not in recorded
    assert "url(" not in recorded
    assert "@font-face" not in recorded
    assert re.findall(r"https?://[^\"]*", recorded) == ["http://www.w3.org/2000/svg"]


def test_equal_styles_of_frames_share_a_class():
    """Whatever number rich gives a style in each frame."""
    text = animated_svg([(0.0, frame("one", "red")), (1.0, frame("two", "blue")), (2.0, frame("six", "red"))], 40, "a")
    root = ElementTree.fromstring(text)
    classes = [group_of(root, word).find(f"{SVG}text").get("class") for word in ("one", "two", "six")]
    assert classes[0] == classes[2] != classes[1]


@pytest.mark.parametrize("times", [(), (1.0,), (0.0, 0.0)])
def test_times_ascend_from_zero(times):
    with pytest.raises(ValueError, match="ascend from 0"):
        animated_svg([(time, "a") for time in times], 40, "a")
