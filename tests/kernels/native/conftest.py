import pytest
import torch

from river_compile.kernels.native import load


@pytest.fixture
def restored():
    """Restores the number of threads and the instruction set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    load.load()
