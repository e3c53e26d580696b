"""The pictures of the manual that are drawn from code and recorded data: ``python -m tools.pictures``."""
