"""One animated SVG of what a terminal shows over time, from frames that rich renders.

The SVG needs no script and no font from elsewhere, so an ``<img>`` of it plays, on GitHub too. CSS shows each piece of
text while it is on the screen. Where animations are off (`prefers-reduced-motion`), the last frame is shown.
Not handled: a screen that changes its size; the last frame sets it.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from rich.console import Console, RenderableType

_NAMESPACE = "http://www.w3.org/2000/svg"
_FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'Liberation Mono','DejaVu Sans Mono',monospace"
_LAYERS = ("backgrounds", "matrix")  # rich's names; backgrounds lie below all text
# What rich fills in for a frame: well-formed XML, of which the parts are taken.
_FRAME = (
    '<frame xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" x="{terminal_x}" y="{terminal_y}">'
    '<style>{styles}</style><g id="chrome">{chrome}</g><g id="backgrounds">{backgrounds}</g><g id="matrix">{matrix}</g>'
    "</frame>"
)
_STYLE = re.compile(r"\.t-(r\d+) \{ (.*?) \}")

Frames = tuple[int, ...]  # numbers of the frames that show a piece, ascending


@dataclass
class _Screen:
    """One frame as rich renders it."""

    root: ElementTree.Element
    styles: dict[str, str]  # CSS by rich's class

    def layer(self, name: str) -> ElementTree.Element:
        return next(group for group in self.root if group.get("id") == name)


def animated_svg(frames: Sequence[tuple[float, RenderableType]], width: int, title: str, pause: float = 5.0) -> str:
    """Return an SVG that plays frames in a loop.

    Args:
        frames: when each begins, in seconds from the start, ascending from 0; and what rich is to print.
        width: of the terminal, in characters.
        title: of the window.
        pause: seconds that the last frame stays before the loop starts again.

    Raises:
        ValueError: there is no frame, or times do not ascend from 0.
    """
    times = [time for time, _ in frames]
    if not times or times[0] != 0 or any(a >= b for a, b in itertools.pairwise(times)):
        raise ValueError(f"frames need times that ascend from 0, got {times}")
    screens = [_render(content, width, title) for _, content in frames]
    classes: dict[str, str] = {}  # by CSS
    layers = [_pieces(screens, name, classes) for name in _LAYERS]
    shown = sorted({during for pieces in layers for during in pieces.values()} - {tuple(range(len(frames)))})
    names = {during: f"a{number}" for number, during in enumerate(shown)}
    last, chrome = screens[-1].root, screens[-1].layer("chrome")
    drawn = [
        _svg(last),
        f"<style>{_still_css(classes)}\n@media (prefers-reduced-motion:no-preference){{\n",
        *(_animation(name, during, times, pause) for during, name in names.items()),
        "}</style>",
        *(
            ElementTree.tostring(element, encoding="unicode").replace(f' xmlns="{_NAMESPACE}"', "")
            for element in chrome
        ),
        f'<g class="t" transform="translate({last.get("x")},{last.get("y")})">',
        *(_groups(pieces, names, len(frames) - 1) for pieces in layers),
        "</g></svg>\n",
    ]
    return "".join(drawn)


def _render(content: RenderableType, width: int, title: str) -> _Screen:
    console = Console(
        width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    console.print(content)
    root = ElementTree.fromstring(console.export_svg(title=title, code_format=_FRAME, unique_id="t"))
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
    return _Screen(root, dict(_STYLE.findall(next(root.iter("style")).text or "")))


def _pieces(screens: Iterable[_Screen], layer: str, classes: dict[str, str]) -> dict[str, Frames]:
    """Return the elements of a layer, each with the frames that show it; give each style a class."""
    found: dict[str, list[int]] = {}
    for number, screen in enumerate(screens):
        for element in screen.layer(layer):
            if element.tag == "text" and not (element.text or "").strip():
                continue
            found.setdefault(_markup(element, screen.styles, classes), []).append(number)
    return {piece: tuple(during) for piece, during in found.items()}


def _markup(element: ElementTree.Element, styles: dict[str, str], classes: dict[str, str]) -> str:
    """Return an element without what all of them share, its class that of all frames."""
    element.attrib.pop("clip-path", None)  # text lies in a terminal's cells, so nothing hangs over
    if "class" in element.attrib:
        css = styles[element.attrib["class"].removeprefix("t-")]
        element.set("class", classes.setdefault(css, f"r{len(classes)}"))
    text = element.text or ""
    if text.endswith("\N{NO-BREAK SPACE}"):
        kept = text.rstrip("\N{NO-BREAK SPACE}")
        element.set("textLength", f"{float(element.attrib['textLength']) * len(kept) / len(text):g}")
        element.text = kept
    return ElementTree.tostring(element, encoding="unicode")


def _groups(pieces: dict[str, Frames], names: dict[Frames, str], last: int) -> str:
    """Return a layer: a group for each set of frames, hidden without animation if the last frame lacks it."""
    groups: dict[Frames, list[str]] = {}
    for piece, during in pieces.items():
        groups.setdefault(during, []).append(piece)
    return "\n".join(
        f"<g{_attributes(names.get(during), last in during)}>{''.join(members)}</g>"
        for during, members in groups.items()
    )


def _attributes(name: str | None, stays: bool) -> str:
    return (f' class="{name}"' if name else "") + ("" if stays else ' visibility="hidden"')


def _animation(name: str, during: Frames, times: Sequence[float], pause: float) -> str:
    """Return the CSS that shows a class during its frames; each keyframe holds until the next one."""
    total = times[-1] + pause
    changes, visible = [], None
    for number, time in enumerate(times):
        if (number in during) != visible:
            visible = number in during
            changes.append(f"{100 * time / total:.4g}%{{visibility:{'visible' if visible else 'hidden'}}}")
    return f".{name}{{animation:{name} {total:.4g}s step-end infinite}}@keyframes {name}{{{''.join(changes)}}}\n"


def _still_css(classes: dict[str, str]) -> str:
    styles = "".join(f".{name}{{{css}}}" for css, name in classes.items())
    return f".t{{font:20px {_FONTS}}}.t-title{{font:bold 18px sans-serif}}{styles}"


def _svg(last: ElementTree.Element) -> str:
    width, height = (float(last.attrib[name]) for name in ("width", "height"))
    return f'<svg xmlns="{_NAMESPACE}" viewBox="0 0 {width:g} {height:g}">'
