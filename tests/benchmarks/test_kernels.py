"""The benchmark script where there is no GPU: its message, and the arithmetic of its table."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_table(script, capsys):
    timing = script.Timing("q|k|v", "6144 x 4096", 10e-6, 14_000_000, 25e-6, None)
    script.print_table([timing], copy=2e12)
    assert capsys.readouterr().out.splitlines()[-1] == "| q\\|k\\|v | 6144 x 4096 | 10.0 | 1400 | 70% | 2.50 |  |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")
def test_without_a_gpu_it_says_so(script, capsys):
    assert script.main([]) == 1
    assert "there is none here" in capsys.readouterr().err
