"""Which instruction sets an ARM processor is offered, by what the system says about it."""

import sys

import pytest

from river_compile.kernels.native import build, machine

ASIMD, DOTPROD = 1 << 1, 1 << 20  # AT_HWCAP
I8MM, BF16 = 1 << 13, 1 << 14  # AT_HWCAP2
EVERYTHING = (1 << 32) - 1


@pytest.fixture
def supported(monkeypatch):
    """Returns the names of the sets of a made-up machine."""

    def names(architecture, system="linux"):
        monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
        monkeypatch.setattr(sys, "platform", system)
        build.supported_isas.cache_clear()
        return [isa.name for isa in build.supported_isas()]

    yield names
    build.supported_isas.cache_clear()


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "names"),
    [
        (0, 0, []),
        (ASIMD, 0, ["neon"]),  # Cortex-A72
        (ASIMD | DOTPROD, 0, ["neon_dotprod", "neon"]),  # Cortex-A76, Neoverse N1
        (ASIMD | DOTPROD, I8MM, ["neon_dotprod", "neon"]),
        (ASIMD | DOTPROD, BF16, ["neon_dotprod", "neon"]),
        (ASIMD | DOTPROD, I8MM | BF16, ["neon_i8mm", "neon_dotprod", "neon"]),  # Neoverse V1
        (ASIMD, I8MM | BF16, ["neon"]),
        (EVERYTHING & ~ASIMD, EVERYTHING, []),
        (ASIMD | DOTPROD, EVERYTHING & ~I8MM, ["neon_dotprod", "neon"]),
        (EVERYTHING & ~DOTPROD, EVERYTHING, ["neon"]),
    ],
)
def test_linux_names_features_in_two_words(hwcap, hwcap2, names, supported, monkeypatch):
    words = {16: hwcap, 26: hwcap2}
    monkeypatch.setattr(machine, "auxiliary_value", words.__getitem__)
    assert supported("aarch64") == [*names, "portable"]


@pytest.mark.parametrize(
    ("answers", "names"),
    [
        ({}, ["neon"]),
        ({"FEAT_DotProd": 1, "FEAT_I8MM": 0, "FEAT_BF16": 0}, ["neon_dotprod", "neon"]),  # M1
        ({"FEAT_DotProd": 1, "FEAT_I8MM": 1, "FEAT_BF16": 1}, ["neon_i8mm", "neon_dotprod", "neon"]),  # M2
    ],
)
def test_macos_names_features_one_by_one(answers, names, supported, monkeypatch):
    monkeypatch.setattr(machine, "sysctl_number", lambda name: answers.get(name.removeprefix("hw.optional.arm."), 0))
    assert supported("arm64", "darwin") == [*names, "portable"]


def test_no_architecture_is_offered_the_sets_of_another(supported, monkeypatch):
    everything = {need for each in (machine.X86, machine.ARM) for isa in build.isas_of(each) for need in isa.needs}
    monkeypatch.setattr(build, "_capabilities", lambda: everything - {"amx_tile"})
    x86, arm = supported("x86_64"), supported("aarch64")
    assert {*x86} & {*arm} == {"portable"}
    assert supported("AMD64") == x86
    assert supported("arm64") == arm
    assert supported("riscv64") == ["portable"]


def test_a_set_of_another_machine_cannot_be_forced(supported, monkeypatch):
    """The message names those of this one."""
    monkeypatch.setattr(machine, "auxiliary_value", lambda kind: ASIMD | DOTPROD)
    assert supported("aarch64") == ["neon_dotprod", "neon", "portable"]
    monkeypatch.delenv("RIVER_COMPILE_ISA", raising=False)
    assert build.choose_isa().name == "neon_dotprod"
    for name in ("neon_dotprod", "neon", "portable"):
        monkeypatch.setenv("RIVER_COMPILE_ISA", name)
        assert build.choose_isa().name == name
    for name in ("avx2", "avx1024", "neon_i8mm"):
        monkeypatch.setenv("RIVER_COMPILE_ISA", name)
        with pytest.raises(
            ValueError, match=f"RIVER_COMPILE_ISA='{name}' is not allowed; choose one of .*neon_dotprod.*neon.*portable"
        ):
            build.choose_isa()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_auxiliary_vector_is_read():
    assert machine.auxiliary_value(6) == machine.os.sysconf("SC_PAGESIZE")  # AT_PAGESZ
    assert machine.auxiliary_value(10_000) == 0
    assert machine.sysctl_number("hw.optional.arm.FEAT_I8MM") == 0, "Linux has no sysctlbyname"


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["processor\t: 0", "model name\t: AMD EPYC 9B14"], "AMD EPYC 9B14"),
        (["CPU implementer\t: 0x41", "CPU part\t: 0xd0c"], "ARM implementer 0x41, part 0xd0c"),
        (
            ["CPU implementer\t: 0x41", "CPU part\t: 0xd0b", "CPU implementer\t: 0x41", "CPU part\t: 0xd05"],
            "ARM implementer 0x41, part 0xd05 and 0xd0b",
        ),
    ],
)
def test_a_processor_is_named(lines, name, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("\n".join(lines))
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor_name() == name


def test_wheels_are_built_for_the_machine_that_the_environment_names(monkeypatch):
    assert machine.target_architecture() == machine.architecture()
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    assert machine.target_architecture() == "aarch64"
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "macosx-11.0-arm64")
    assert machine.target_architecture() == "aarch64"
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "macosx-10.13-universal2")
    assert machine.target_architecture() == machine.architecture()


def test_the_last_level_cache_is_the_outermost_one(tmp_path):
    for index, (level, size) in enumerate([(1, "48K"), (3, "32768K"), (2, "1024K")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.last_level_cache(tmp_path) == 32 * 2**20
    assert machine.last_level_cache(tmp_path / "none") is None
