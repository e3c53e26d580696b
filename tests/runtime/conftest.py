"""Captures without a GPU: models on a CPU that ask for CUDA graphs are captured by the recorder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.recorder import recording


@pytest.fixture(autouse=True, scope="module")
def _recording() -> Iterator[None]:
    with recording():
        yield
