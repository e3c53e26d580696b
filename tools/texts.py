"""Texts that need no download, for calibration and measurements: Python's own documentation of the language."""

from __future__ import annotations


def topics() -> list[str]:
    """Returns a passage of each topic that Python's `help()` knows, without its heading; two topics may share one."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text.partition("\n\n")[2] for text in topics.values()))
