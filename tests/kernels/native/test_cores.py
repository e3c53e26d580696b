"""Kernels run on the fast cores of a machine with slower ones, if nothing chose the number of threads."""

import pytest
import torch

from river_compile.kernels.native import cores, load
from river_compile.kernels.native.cores import Cores, linux_cores


@pytest.fixture
def system(tmp_path):
    """Returns a function that writes the folder /sys/devices of a machine."""

    def write(siblings=(), capacities=(), performance=""):
        for number, text in enumerate(siblings):
            folder = tmp_path / f"system/cpu/cpu{number}"
            (folder / "topology").mkdir(parents=True)
            (folder / "topology/thread_siblings_list").write_text(f"{text}\n")
            if capacities:
                (folder / "cpu_capacity").write_text(f"{capacities[number]}\n")
        if performance:
            (tmp_path / "cpu_core").mkdir()
            (tmp_path / "cpu_core/cpus").write_text(f"{performance}\n")
        return tmp_path

    return write


def test_cores_of_one_kind_are_all_fast(system):
    assert linux_cores(system(["0-1", "0-1", "2-3", "2-3"]), range(4)) == (2, 2)


def test_a_system_that_tells_nothing_has_cores_of_one_kind(tmp_path):
    assert linux_cores(tmp_path, range(3)) == (3, 3)


def test_arm_cores_differ_by_their_capacity(system):
    rk3588 = system(range(8), [414] * 4 + [1024] * 4)
    assert linux_cores(rk3588, range(8)) == (8, 4)
    assert linux_cores(rk3588, range(2, 6)) == (4, 2)
    assert linux_cores(rk3588, range(4)) == (4, 4), "slow ones alone are of one kind"


def test_middle_cores_are_fast_if_they_are_nearly_as_fast(system):
    assert linux_cores(system(range(8), [282] * 4 + [850] * 3 + [1024]), range(8)) == (8, 4)


def test_hybrid_x86_cores_count_once_for_two_threads(system):
    siblings = [f"{2 * (i // 2)}-{2 * (i // 2) + 1}" for i in range(8)] + [*range(8, 16)]
    hybrid = system(siblings, performance="0-7")
    assert linux_cores(hybrid, range(16)) == (12, 4)
    assert linux_cores(hybrid, [0, 1, 2, 9]) == (3, 2)
    assert linux_cores(hybrid, range(8, 16)) == (8, 8)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"hw.physicalcpu": 8, "hw.perflevel0.physicalcpu": 4}, (8, 4)),
        ({"hw.physicalcpu": 4, "hw.perflevel0.physicalcpu": 0}, (4, 4)),  # without levels
    ],
)
def test_macos_counts_its_performance_cores(answers, found, monkeypatch):
    monkeypatch.setattr(cores.sys, "platform", "darwin")
    monkeypatch.setattr(cores, "sysctl_number", answers.__getitem__)
    assert cores.cores.__wrapped__() == found


@pytest.fixture
def ops(restored):
    """The operators, which leave no core out before and after the test."""
    operators = load.load()
    operators.use_cores(0, 0)
    yield operators
    operators.use_cores(*(cores.limit() or (0, 0)))


@pytest.fixture
def hybrid(ops, monkeypatch):
    """A machine of 8 cores, 3 of them fast."""
    monkeypatch.setattr(cores, "cores", lambda: Cores(8, 3))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("hybrid")
@pytest.mark.parametrize(("given", "used"), [(8, 3), (16, 3), (7, 7), (3, 3), (1, 1)])
def test_a_number_below_all_cores_is_a_choice(given, used, ops):
    """In C++ as in Python."""
    torch.set_num_threads(given)
    assert ops.threads() == given
    ops.use_cores(*cores.limit())
    assert cores.threads() == ops.threads() == used
    assert bool(cores.limit_text()) == (given >= 8)


@pytest.mark.usefixtures("hybrid")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_environment_chooses(name, monkeypatch):
    torch.set_num_threads(8)
    monkeypatch.setenv(name, "8")
    assert cores.limit() is None
    assert cores.threads() == 8
    assert cores.limit_text() == ""


def test_a_tape_has_the_same_bits_on_the_fast_cores(ops):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(3)
    expected = ops.dense(x, [weight], [])
    ops.use_cores(3, 2)
    tape = load.Tape()
    with tape.recording():
        out = ops.dense(x, [weight], [])
    tape.replay()
    assert torch.equal(out, expected)
