"""How tests of commands make a model quick to compile."""

from __future__ import annotations

import pytest

from river_compile.config import RiverConfig
from tests.support.lowerings import OPERATORS


def compile_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has everything that takes the backend's defaults run operator by operator, in groups that fit a tiny model."""
    checked = RiverConfig.from_options.__func__
    quick = {"kernels": OPERATORS, "group_size": 32}
    monkeypatch.setattr(RiverConfig, "from_options", classmethod(lambda cls, o: checked(cls, {**quick, **(o or {})})))
