"""Building and loading: caching, rebuilds, and errors without a compiler."""

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from river_compile.kernels.native import build, load
from tests.support.layout import ROOT, run_python


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources that compile quickly, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text(
        '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'
    )
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path / "cache"))
    return folder


def built(source, name, flags):
    return build.build(build.find_compiler(), [source], name, flags)


def answer(library):
    return ctypes.CDLL(str(library)).answer()


@pytest.mark.usefixtures("sources")
def test_a_library_is_built_once():
    library = built("answer.cpp", "answer", ())
    when = library.stat().st_mtime_ns
    assert built("answer.cpp", "answer", ()) == library
    assert library.stat().st_mtime_ns == when
    assert answer(library) == 42
    left = sorted(file.name for file in library.parent.iterdir())
    assert left == [f".{library.name}.lock", library.name], "no scratch files stay"


def test_whatever_a_library_is_made_from_is_in_its_name(sources, monkeypatch):
    names = {built("answer.cpp", "answer", flags).name for flags in ((), ("-DMORE",))}
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    changed = built("answer.cpp", "answer", ())
    assert answer(changed) == 43
    names.add(changed.name)
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.add(built("answer.cpp", "answer", ()).name)
    patched = build.Compiler(build.find_compiler().command, "another version")
    names.add(build.build(patched, ["answer.cpp"], "answer", ()).name)
    assert len(names) == 5


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: data[:-40] + b"x" * 40])
def test_a_damaged_library_is_built_again(damage):
    library = built("answer.cpp", "answer", ())
    library.write_bytes(damage(library.read_bytes()))
    with pytest.warns(UserWarning, match="were damaged and are rebuilt"):
        assert built("answer.cpp", "answer", ()) == library
    assert answer(library) == 42


@pytest.mark.usefixtures("sources")
def test_of_builds_at_the_same_time_one_compiles(monkeypatch):
    real, calls = build._run, []
    monkeypatch.setattr(build, "_run", lambda command: calls.append(command) or real(command))
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(lambda _: built("answer.cpp", "answer", ()), range(4)))
    assert len(libraries) == len(calls) == 1
    assert answer(libraries.pop()) == 42


def test_without_a_compiler_the_message_says_so():
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(build.CannotBuild, match="Install g"):
        build.find_compiler()


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("echo the license ran out >&2; exit 1", "the license ran out"),
        ("exit 7", "exit status 7"),
        ("", "wrote nothing"),
    ],
)
def test_a_compiler_counts_once_it_has_compiled_something(does, says, tmp_path):
    """Printing a version is not enough."""
    assert build.working_compiler() == build.find_compiler()
    compiler = script(tmp_path / "c++", 'case "$1" in -v|--version) echo version 1; exit;; esac', does)
    with inductor.patch({"cpp.cxx": (None, compiler)}), pytest.raises(build.CannotBuild, match=says) as said:
        build.working_compiler()
    assert f"{compiler} cannot compile C++ here" in str(said.value)
    assert "Install g++" in str(said.value)


def test_what_a_compiler_did_not_write_is_not_kept(sources, tmp_path):
    compiler = build.Compiler(script(tmp_path / "c++"), "1")
    with pytest.raises(build.CannotBuild, match="wrote nothing"):
        build.build(compiler, ["answer.cpp"], "answer", ())
    assert [file.suffix for file in (sources.parent / "cache/native").iterdir()] == [".lock"]


def test_a_cache_of_inductors_that_cannot_be_written_is_named(monkeypatch):
    build._try_out.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{__file__}/cache")
    with pytest.raises(build.CannotBuild, match="Set TORCHINDUCTOR_CACHE_DIR to a writable folder"):
        build.working_compiler()


@pytest.mark.usefixtures("sources")
def test_where_the_cache_cannot_be_written_a_process_builds_for_itself(monkeypatch):
    """With one warning for any number of libraries; a read-only cache that has the files works."""
    monkeypatch.setenv("RIVER_COMPILE_HOME", f"{__file__}/cache")
    with pytest.warns(UserWarning, match="^RC104: Cannot write.*set RIVER_COMPILE_HOME") as said:
        libraries = [built("answer.cpp", name, ()) for name in ("answer", "another", "answer")]
    assert len(said) == 1
    assert libraries[0] == libraries[2]
    assert [answer(library) for library in libraries] == [42, 42, 42]


def test_on_a_full_disk_a_process_builds_elsewhere_before_it_compiles(sources, tmp_path, monkeypatch):
    usage = build.shutil.disk_usage
    full = tmp_path / "cache"
    monkeypatch.setattr(
        build.shutil,
        "disk_usage",
        lambda path: usage(path)._replace(free=1000 if full in Path(path).parents else 10**9),
    )
    with pytest.warns(UserWarning, match="Cannot write.*No space left on device"):
        library = built("answer.cpp", "answer", ())
    assert full not in library.parents
    assert answer(library) == 42


def test_several_sources_become_one_library(sources):
    """They are compiled at the same time; if one is refused, nothing of the other stays."""
    (sources / "answer.cpp").write_text(
        'int half();\nextern "C" __attribute__((visibility("default"))) int answer() { return 2 * half(); }\n'
    )
    cache = sources.parent / "cache/native"
    for half, error in (("#error no half\n", "no half"), ("int half() { return 21; }\n", None)):
        (sources / "half.cpp").write_text(half)
        with pytest.raises(build.CannotBuild, match=error) if error else contextlib.nullcontext():
            library = build.build(build.find_compiler(), ["answer.cpp", "half.cpp"], "answer", ())
        assert {file.suffix for file in cache.iterdir()} == ({".lock"} if error else {".lock", ".so"})
    assert answer(library) == 42


def test_a_build_goes_on_when_the_main_thread_has_ended(sources):
    """So a process that is done early leaves the library to later ones."""
    (sources / "half.cpp").write_text("int half() { return 21; }\n")
    code = f"""
import pathlib, time
from concurrent.futures import ThreadPoolExecutor, thread
from river_compile.kernels.native import build
build.SOURCES = pathlib.Path({str(sources)!r})
def late():
    while not thread._shutdown:  # which the main thread sets when it has ended, before it waits for this one
        time.sleep(0.01)
    build.build(build.find_compiler(), ["answer.cpp", "half.cpp"], "answer", ())
ThreadPoolExecutor(1).submit(late)
"""
    cache = sources.parent / "cache"
    run_python(code, sources, ROOT, RIVER_COMPILE_HOME=str(cache))
    (library,) = (cache / "native").glob("*.so")
    assert answer(library) == 42


@pytest.mark.slow
def test_what_began_to_compile_is_what_is_loaded(tmp_path):
    """In a new process, with a compiler that logs its commands: none runs twice."""
    log = tmp_path / "log"
    logged = f'case "$*" in *.cpp*) echo "$*" >> {log};; esac'
    compiler = script(tmp_path / "c++", logged, f'exec {build.find_compiler().command} "$@"')
    code = """
from river_compile.kernels.native import load
load.begin()
load.begin()
assert not load.loaded()
load.load()
assert load.loaded()
"""
    where = {"RIVER_COMPILE_HOME": str(tmp_path / "cache"), "RIVER_COMPILE_ISA": "portable"}
    run_python(code, tmp_path, ROOT, CXX=compiler, **where)
    asked = [word for line in log.read_text().splitlines() for word in line.split() if word.endswith(".cpp")]
    assert sorted(asked) == ["kernels/gemm.cpp", "kernels/kernels.cpp", "operators/bindings.cpp", "packing/packing.cpp"]


def test_where_there_is_no_compiler_nothing_begins():
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(build.CannotBuild, match="Install g"):
        load.begin()


def test_a_machine_runs_what_its_capabilities_allow(monkeypatch):
    build.supported_isas.cache_clear()
    needs = {"avx2", "fma3", "f16c", "avx_vnni"}
    monkeypatch.setattr(build, "_capabilities", lambda: needs)
    try:
        assert [one.name for one in build.supported_isas()] == ["avx_vnni", "avx2", "portable"]
    finally:
        build.supported_isas.cache_clear()


@pytest.mark.slow
def test_operators_that_nobody_loaded_name_the_fix(tmp_path):
    """In a new process, since loading is final."""
    code = """
import torch
from river_compile.kernels.native import build, load
torch.ops.load_library(str(build.operators_library()))
x = torch.ones(1, 32)
try:
    torch.ops.river_native.linear(x, torch.zeros(1, 1, 4, 64, dtype=torch.uint8), torch.zeros(1, 1, 16, 2).bfloat16(),
                                  None, 16, 32)
except RuntimeError as error:
    print("load()" in str(error))
"""
    load.load()  # the operators are in the cache then
    assert run_python(code, tmp_path, ROOT).stdout.strip() == "True"


def test_a_process_that_forks_during_a_build_loads_anew(tmp_path):
    """The child lacks the threads that build, whose results it would wait for without an end."""
    code = """
import os, signal, time
from river_compile.kernels.native import load
built = load.kernels_library
load.kernels_library = lambda isa: (time.sleep(3), built(isa))[1]
load.begin()
child = os.fork()
if not child:
    signal.alarm(100)
    load.kernels_library = built
    load.load()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    load.load()  # the libraries are in the cache then
    assert run_python(code, tmp_path, ROOT).stdout.strip() == "0"
