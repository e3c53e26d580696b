"""The check of an emulated ARM machine, with a stand-in for its Python."""

from tools import arm_environment


def test_each_instruction_set_generates_without_a_compiler_and_failures_count(tmp_path, capfd):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$RIVER_COMPILE_ISA $CXX"\ntest "$RIVER_COMPILE_ISA" != neon || exit 7\n')
    python.chmod(0o755)
    assert arm_environment.main(["check", str(tmp_path)]) == 1
    said = capfd.readouterr().out.splitlines()
    assert [line for line in said if line.endswith(" false")] == [
        f"{name} false" for name in ("neon_i8mm", "neon_dotprod", "neon", "portable")
    ]
    assert "neon: exit status 7" in said
