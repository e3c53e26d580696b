"""Generated sources and tuning files of the tests stay in a folder of their own."""

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def _own_cache(tmp_path_factory):
    before = {name: os.environ.get(name) for name in ("RIVER_COMPILE_CACHE", "RIVER_COMPILE_TUNING")}
    os.environ["RIVER_COMPILE_CACHE"] = str(tmp_path_factory.mktemp("river_compile"))
    os.environ.pop("RIVER_COMPILE_TUNING", None)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
