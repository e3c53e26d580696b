"""The pictures of the manual that are drawn from code and recorded data: ``python -m tools.pictures``."""

from pathlib import Path

DATA = Path(__file__).parent / "data"  # what was recorded
