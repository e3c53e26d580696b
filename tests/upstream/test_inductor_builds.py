"""Inductor's C++ appears whole or not at all: what the compiler writes is moved to where processes look for it."""

import shlex

import pytest
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError

from river_compile.upstream.dynamo import build_libraries_atomically


@pytest.fixture
def run(monkeypatch):
    """Inductor's function as it is after the call; what it was before comes back."""
    original = getattr(cpp_builder.run_compile_cmd, "__wrapped__", cpp_builder.run_compile_cmd)
    monkeypatch.setattr(cpp_builder, "run_compile_cmd", original)
    build_libraries_atomically()
    return cpp_builder.run_compile_cmd


@pytest.mark.core
@pytest.mark.usefixtures("run")
def test_inductor_builds_through_it(tmp_path, monkeypatch):
    """A contract: `CppBuilder.build` calls the module's function, and the library lands where it is looked for."""
    source = tmp_path / "source.cpp"
    source.write_text("int answer() { return 42; }\n")
    options = cpp_builder.CppOptions(compile_only=True)
    builder = cpp_builder.CppBuilder("answer", str(source), options, str(tmp_path / "out"))
    seen, real = [], cpp_builder._run_compile_cmd
    monkeypatch.setattr(
        cpp_builder, "_run_compile_cmd", lambda command, cwd: seen.append(shlex.split(command)) or real(command, cwd)
    )
    builder.build()
    (command,) = seen
    target = builder.get_target_file_path()
    assert target not in command
    assert [file.name for file in (tmp_path / "out").iterdir()] == [target.rpartition("/")[2]]


def test_half_a_file_is_not_left_behind(run, tmp_path):
    """A compiler that dies in the middle of its output."""
    script = tmp_path / "dies"
    script.write_text("#!/bin/sh\nprintf half > $2\nkill -9 $$\n")
    script.chmod(0o755)
    with pytest.raises(CppCompileError):
        run(f"{script} -o {tmp_path / 'out' / 'library.so'}", str(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []
