"""Texts that need no download, for calibration and measurements: a file's, or Python's documentation."""

from __future__ import annotations

from pathlib import Path


def topics() -> list[str]:
    """Returns a passage of each topic that Python's `help()` knows, without its heading; two topics may share one."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text.partition("\n\n")[2] for text in topics.values()))


def passages(file: Path | None) -> list[str]:
    """Returns a file's texts, which empty lines separate; without a file those of :func:`topics`.

    Raises:
        ValueError: the file cannot be read or has no text.
    """
    if file is None:
        return topics()
    try:
        found = [text.strip() for text in file.read_text(encoding="utf-8").split("\n\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--texts {file} cannot be read: {error}") from None
    if not any(found):
        raise ValueError(f"--texts {file} has no text; give one text after another, separated by empty lines")
    return [text for text in found if text]
