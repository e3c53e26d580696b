"""Two drawings: a draft, a verification and an exit over one KV cache; and the bytes of a line of 4-bit weights."""

from __future__ import annotations

from tools.pictures.svg import EXACT, FAINT, IDLE, INK, TWIN, arrow, box, document, words

WIDTH = 900
_LAYERS = 6  # drawn of each stack
_PANEL, _TOP, _STEP, _HIGH = 300, 92, 34, 24


def how_it_works() -> str:
    """Return the drawing of a cycle's three states as an SVG."""
    parts = [
        *_panel(0, "1  Draft", "The twins propose tokens, one at a time.\nEach writes its keys and values.", 0, 3),
        *_panel(1, "2  Verify", "One pass of your 16-bit layers\nscores them, and overwrites their entries.", 6, 4),
        *_panel(2, "Exit", "A token leaves the 16-bit layers early.\nThe twins fill in the missing entries.", 2, 1),
    ]
    parts += [
        f'<line x1="{x}" y1="24" x2="{x}" y2="370" stroke="{IDLE}" stroke-width="2"/>' for x in (_PANEL, 2 * _PANEL)
    ]
    parts += [
        words(_PANEL, 396, "exact mode: 1 and 2 in turn, the output is that of the 16-bit layers", 13, FAINT),
        words(2.5 * _PANEL, 396, "fast mode: the output changes", 13, FAINT),
    ]
    title = "Two stacks of layers, 16-bit and 4-bit, that write one KV cache: a draft, a verification and an exit"
    return document(WIDTH, 412, title, parts)


def _panel(index: int, title: str, caption: str, depth: int, tokens: int) -> list[str]:
    """Return one state: so many tokens run `depth` 16-bit layers of six, and then twins."""
    left, bottom = index * _PANEL, _TOP + (_LAYERS - 1) * _STEP
    layers, cache, twins = left + 22, left + 112, left + 208
    parts = [
        words(left + _PANEL / 2, 36, title, 17),
        *(words(x + 35, 70, name, 12, FAINT) for x, name in ((layers, "16-bit layers"), (twins, "4-bit twins"))),
        words(cache + 38, 70, "KV cache", 12, FAINT),
    ]
    for layer in range(_LAYERS):
        y, own = bottom - layer * _STEP, layer < depth
        color = EXACT if own else TWIN
        parts += [box(layers, y, 70, _HIGH, EXACT if own else IDLE), box(twins, y, 70, _HIGH, IDLE if own else TWIN)]
        parts += [
            words(x + 35, y + 17, str(layer + 1), 12, "#ffffff" if runs else FAINT)
            for x, runs in ((layers, own), (twins, not own))
        ]
        slots = [box(cache + 19 * slot, y + 2, 16, _HIGH - 4, EXACT, EXACT) for slot in range(4 - tokens)]
        slots += [box(cache + 19 * slot, y + 2, 16, _HIGH - 4, color, color) for slot in range(4 - tokens, 4)]
        start, end = (layers + 71, cache - 3) if own else (twins - 1, cache + 78)
        parts += [*slots, arrow(start, y + _HIGH / 2, end, y + _HIGH / 2, color)]
    entry = (layers if depth else twins) + 35
    parts.append(arrow(entry, bottom + 58, entry, bottom + 28, EXACT if depth else TWIN, 2))
    if 0 < depth < _LAYERS:
        top = bottom - depth * _STEP
        path = f"M{layers + 35} {top + _STEP - 2} V{top + _STEP - 6} H{twins + 35} V{top + _HIGH + 3}"
        parts.append(f'<path d="{path}" fill="none" stroke="{TWIN}" stroke-width="2" marker-end="url(#twin)"/>')
    leaving = (layers if depth == _LAYERS else twins) + 35
    parts.append(arrow(leaving, _TOP - 2, leaving, _TOP - 16, EXACT if depth == _LAYERS else TWIN, 2))
    plural = "token" if tokens == 1 else "tokens"
    how = f"{tokens} {plural}, one by one" if not depth else f"{tokens} {plural} in one pass"
    beside = left + (30 if not depth else 270)
    parts.append(words(beside, bottom + 52, how, 12, INK, "start" if not depth else "end"))
    return [*parts, *(words(left + _PANEL / 2, 346 + 17 * i, line, 13) for i, line in enumerate(caption.split("\n")))]


def weight_line() -> str:
    """Return the drawing of a 64-byte line of 4-bit weights as an SVG."""
    parts = [
        words(24, 34, "One 64-byte line: 16 output features (lanes of 4 bytes) of 8 input features", 15, INK, "start")
    ]
    lane, top = 53, 52
    for n in range(16):
        x = 26 + n * lane
        chosen = n == 2
        parts += [box(x + 12.5 * j, top, 12, 30, TWIN if chosen else IDLE) for j in range(4)]
        parts.append(words(x + 25, top + 47, str(n), 12, INK if chosen else FAINT))
    parts.append(
        words(24, 130, "lane 2, enlarged: byte j holds input feature j below and feature 4 + j above", 13, INK, "start")
    )
    for j in range(4):
        x = 26 + 130 * j
        parts += [box(x, 144, 60, 34, "#fbe3c2", TWIN), box(x + 60, 144, 60, 34, TWIN, TWIN)]
        parts += [words(x + 30, 166, f"q[{4 + j}]", 14), words(x + 90, 166, f"q[{j}]", 14, "#ffffff")]
        parts.append(words(x + 30, 194, "bits 7–4", 11, FAINT) + words(x + 90, 194, "bits 3–0", 11, FAINT))
    parts += [
        words(560, 158, "4 bits: q from 0 to 15", 13, INK, "start"),
        words(560, 176, "weight = scale · (q − 8) + zero", 13, INK, "start"),
        words(24, 234, "& 0x0F, then one instruction (VPDPBUSD) for all 16 lanes:", 13, INK, "start"),
        words(24, 256, "sum[2] += q[0]·i[0] + q[1]·i[1] + q[2]·i[2] + q[3]·i[3]", 15, EXACT, "start"),
        words(24, 290, ">> 4, then the same instruction once more:", 13, INK, "start"),
        words(24, 312, "sum[2] += q[4]·i[4] + q[5]·i[5] + q[6]·i[6] + q[7]·i[7]", 15, EXACT, "start"),
        words(470, 256, "q: unsigned bytes, i: activations as signed bytes", 13, FAINT, "start"),
        words(470, 312, "128 products by two instructions and 64 bytes read", 13, FAINT, "start"),
    ]
    return document(WIDTH, 332, "The bytes of a line of 4-bit weights, and the products that they take part in", parts)
