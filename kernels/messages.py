"""Ids of the warnings of kernels; those of the layers above are in river_compile/errors.py.

Each has a section in docs/troubleshooting.md. Ids are stable.
"""

from __future__ import annotations

TITLES = {
    "RC084": "Tuning file cannot be read",
    "RC103": "Cached file was damaged",
    "RC104": "Cache folder cannot be written",
}


def with_id(id: str, text: str) -> str:
    """Return the message of an error or a warning: the id of its cause, its text, and the command that explains it."""
    return f"{id}: {text.rstrip().removesuffix('.')}. See `river explain-error {id}`"
