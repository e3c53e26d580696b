"""A separate folder for generated sources and tuning files; C++ libraries are the machine's, named by a hash."""

import pytest

from river_compile.kernels.files import cache_folder


@pytest.fixture(scope="package", autouse=True)
def _own_cache(tmp_path_factory):
    libraries = cache_folder().absolute() / "native"
    libraries.mkdir(parents=True, exist_ok=True)
    own = tmp_path_factory.mktemp("river_compile")
    (own / "native").symlink_to(libraries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVER_COMPILE_HOME", str(own))
        patch.delenv("RIVER_COMPILE_TUNING", raising=False)
        yield
