"""Elements of an SVG as text, in the colors that all drawings share. Text is drawn in the reader's sans-serif font."""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, FAINT, PAPER = "#1f2933", "#8a96a3", "#ffffff"
EXACT, TWIN, IDLE = "#2a78b5", "#e08a1e", "#eef1f4"  # written by the 16-bit layers, by the twins, by none
_FONT = 'font-family="system-ui, sans-serif"'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = FAINT) -> str:
    """Return a rectangle with round corners; sizes are in pixels."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{stroke}"/>'


def words(x: float, y: float, text: str, size: int = 13, fill: str = INK, anchor: str = "middle") -> str:
    """Return a line of text with its baseline at y; `anchor` is "start", "middle" or "end"."""
    style = f'font-size="{size}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1.5) -> str:
    """Return a straight arrow."""
    head = {EXACT: "exact", TWIN: "twin"}.get(color, "ink")
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width:g}" marker-end="url(#{head})"/>'


def document(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG on white paper, so that it reads on dark pages too."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
        for name, color in (("exact", EXACT), ("twin", TWIN), ("ink", INK))
    )
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {_FONT}>',
        f"<title>{escape(title)}</title>",
        f"<defs>{heads}</defs>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
