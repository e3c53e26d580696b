"""How many matrices are packed at the same time: as many as torch has threads on a CPU, one on a device."""

import threading

import pytest
import torch

from river_compile.config import RiverConfig
from river_compile.kernels.quant.grid import threads_for
from river_compile.passes.program import Matmul
from river_compile.twins import digests, making
from river_compile.twins.making import Job, Statistics
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import Parameters
from tests.support.layout import ROOT, run_python


class Made:
    """What is packed."""

    output_sqnr, parameters = None, ()

    def __init__(self, matmul):
        self.matmul = matmul


class Maker:
    """Packs nothing, and notes how many do so at the same time."""

    def __init__(self):
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        self._together = threading.Event()

    def __call__(self, matmul, parameters, digest, asked, known, device):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self._now > 1:
                self._together.set()
        self._together.wait(0.2)
        with self._lock:
            self._now -= 1
        return Made(matmul)


def find(weights, matmuls, inputs, device):
    parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in matmuls}
    how = RiverConfig(quantizer="rtn"), Statistics(), torch.device(device)
    return weights.find(matmuls, Job(*how, parameters, weights.digests.of(parameters)))


@pytest.mark.parametrize(("device", "threads"), [("cpu", 3), ("meta", 1)])
def test_a_device_packs_one_matrix_after_the_other(device, threads, monkeypatch):
    """Each takes float32 copies of its weights there."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(making, "make_weight", maker := Maker())
    monkeypatch.setattr(digests, "digest_of", lambda tensors: str(id(tensors[0])))
    monkeypatch.setattr(making.ParameterStamp, "__init__", lambda self, tensors: None)
    inputs = [torch.empty(4, 4, device=device) for _ in range(6)]
    options = {"in_features": 4, "out_features": (4,), "transposed": False, "group_size": 4, "layout": "plain"}
    matmuls = [Matmul(name=str(i), weights=(i,), biases=(None,), **options) for i in range(6)]
    made = find(TwinWeights(), matmuls, inputs, device)
    assert list(made.packed) == [twin.matmul for twin in made.packed.values()] == matmuls
    assert threads_for(inputs[0]) == threads
    assert (maker.most > 1) == (threads > 1)


def test_weights_on_another_device_are_packed_for_it():
    """The same values have the same digest wherever they lie; what is packed lies where its program runs."""
    options = {"in_features": 64, "out_features": (64,), "transposed": False, "group_size": 64, "layout": "plain"}
    matmul = Matmul(name="a", weights=(0,), biases=(None,), **options)
    weights, found, inputs = TwinWeights(), [], [torch.randn(64, 64)]
    for device in ("cpu", "meta", "cpu"):
        made = find(weights, [matmul], inputs, device)
        found.append(made.packed[matmul])
    assert [twin.weight.qweight.device.type for twin in found] == ["cpu", "meta", "cpu"]
    assert found[0] is found[2]


def test_threads_begin_after_the_main_one_has_ended(tmp_path):
    """The file of 12-bit weights may be written then."""
    code = """
import threading, time
from concurrent.futures import thread
from river_compile.twins.threads import in_threads
def late():
    while not thread._shutdown:  # which the main thread sets when it has ended, before it waits for this one
        time.sleep(0.01)
    print(in_threads(abs, [-1, 2]))
threading.Thread(target=late).start()
"""
    assert run_python(code, tmp_path, ROOT).stdout.split("\n")[0] == "[1, 2]"
