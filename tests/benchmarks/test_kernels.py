"""The benchmark script where there is no GPU: its message, and the arithmetic of its table."""

import pytest
import torch

from benchmarks import kernels


def test_table(capsys):
    timing = kernels.Timing("q|k|v", "6144 x 4096", 10e-6, 14_000_000, 25e-6, None)
    kernels.print_table([timing], copy=2e12)
    assert capsys.readouterr().out.splitlines()[-1] == "| q\\|k\\|v | 6144 x 4096 | 10.0 | 1400 | 70% | 2.50 |  |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main([]) == 1
    assert "there is none here" in capsys.readouterr().err
