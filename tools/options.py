"""Writes the backend's options into docs/options.md, between two marks: ``python -m tools.options``."""

from __future__ import annotations

from river_compile.config import EXPERT, USER, RiverConfig
from tools.marked import ROOT, filled

PAGE = ROOT / "docs/options.md"


def tables() -> str:
    """Return the page's tables: options of most users, and those of experts."""
    return f"{_table(USER)}\nFor experts:\n\n{_table(EXPERT)}"


def replaced() -> str:
    """Return the page's text with its tables between the marks."""
    return filled(PAGE, "options", lambda _: tables())


def _table(audience: str) -> str:
    defaults, types = vars(RiverConfig), RiverConfig.__annotations__
    rows = ["| option | default | type | meaning |\n|---|---|---|---|\n"]
    for name, option in RiverConfig.options().items():
        if option.audience == audience:
            kind = types[name].removesuffix(" | Lowering")  # (which tests give)
            kind = kind.replace("Threshold", "float | list[float]").replace(" | ", "` or `")
            rows.append(f"| `{name}` | {_code(defaults[name])} | `{kind}` | {option.text} |\n")
    return "".join(rows)


def _code(default: object) -> str:
    return str(default) if type(default) is int else f"`{_text(default)}`"


def _text(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main() -> int:
    """Write the page; return the exit status."""
    PAGE.write_text(replaced(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
