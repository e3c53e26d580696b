"""Gaps of a trace, by doubles of events."""

import types

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import cuda_trace


def event(name, start, end, on_device=True):
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    return types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=start, end=end))


def test_gaps_stand_between_what_ends_last_and_what_begins_next(capsys):
    events = [
        event("long", 0, 50),
        event("short", 10, 20),
        event("host", 50, 60, on_device=False),
        event("late", 57, 60),
        event("last", 80, 90),
    ]
    assert cuda_trace.gaps(events) == [(20, "late", "last"), (7, "long", "late")]
    found = cuda_trace.show("forced never", events)
    assert (found["busy_us"], found["idle_us"]) == (63, 27)
    assert "the device works 63 us and waits 27 us in 2 gaps" in capsys.readouterr().out
    assert cuda_trace.gaps([]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cuda_trace.main([]) == 1
    assert "there is none here" in capsys.readouterr().err
