"""`F.linear` by the C++ kernels while a model samples and is observed."""

import pytest
import torch
from torch.nn import functional

from river_compile.kernels.native import load
from river_compile.twins.own_text import NativeLinear


@pytest.fixture
def products(monkeypatch):
    """Counts the products that the C++ kernels compute."""
    load.load()
    dense, seen = torch.ops.river_native.dense, []

    def counted(x, weights, biases):
        seen.append(x.dtype)
        return dense(x, weights, biases)

    monkeypatch.setattr(torch.ops.river_native, "dense", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_16_bits_are_the_kernels(products, dtype, bias):
    layer = torch.nn.Linear(70, 30, bias=bias).to(dtype)
    x = torch.randn(2, 20, 70).to(dtype)
    with torch.no_grad(), NativeLinear():
        y = layer(x)
    assert products == [dtype]
    expected = functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(y.double(), expected, atol=2e-2, rtol=2e-2)


def test_what_the_kernels_cannot_do_is_torchs(products):
    """Float32, gradients, strided inputs and weights, and dtypes that differ, with torch's own error."""
    layer, x = torch.nn.Linear(70, 30, bias=False).bfloat16(), torch.randn(20, 70).bfloat16()
    with NativeLinear():
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        with torch.no_grad():
            torch.nn.Linear(70, 30)(x.float())
            layer(torch.randn(70, 20).bfloat16().T)
            functional.linear(x, layer.weight.T.contiguous().T)
            with pytest.raises(RuntimeError, match="dtype"):
                functional.linear(x, layer.weight.half())
    assert products == []


def test_nothing_is_done_before_kernels_are_loaded(products, monkeypatch):
    monkeypatch.setattr(load, "_tables", {})
    layer = torch.nn.Linear(70, 30).bfloat16()
    with torch.no_grad(), NativeLinear():
        layer(torch.randn(20, 70).bfloat16())
    assert products == []
