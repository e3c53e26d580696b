"""How many matrices are packed at once: as many as torch has threads on a CPU, one on a device."""

import threading
import types

import pytest
import torch

from river_compile.kernels.quant.grid import threads_for
from river_compile.twins.registry import Statistics, TwinRegistry


class Sources(types.SimpleNamespace):
    """What a product is made from, on some device; hashing is noted."""

    @property
    def digest(self):
        self.log.append("hash")
        return ""


class Maker:
    """Packs nothing, and notes how many do so at once."""

    def __init__(self, log):
        self.log, self.most, self._now, self._lock = log, 0, 0, threading.Lock()
        self._together = threading.Event()

    needs_statistics, observation = False, None

    def look_up(self, site, sources):
        return None

    def make(self, site, sources, known):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self._now > 1:
                self._together.set()
        self._together.wait(0.2)
        with self._lock:
            self._now -= 1
            self.log.append("make")
        return types.SimpleNamespace(site=site, output_sqnr=None)


@pytest.mark.parametrize(("device", "threads"), [("cpu", 3), ("meta", 1)])
def test_a_device_packs_one_matrix_after_the_other(device, threads, monkeypatch):
    """Each takes float32 copies of its weights there. What the host does alone, hashing, comes before."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    log: list[str] = []
    maker, weight, sites = Maker(log), torch.empty(4, 4, device=device), list("abcdef")
    made = TwinRegistry()._make(maker, sites, dict.fromkeys(sites, Sources(weights=(weight,), log=log)), Statistics())
    assert list(made) == [twin.site for twin in made.values()] == sites
    assert threads_for(weight) == threads
    assert (maker.most > 1) == (threads > 1)
    assert log == ["hash"] * 6 * (threads == 1) + ["make"] * 6
