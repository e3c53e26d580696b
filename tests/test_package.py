"""The package's shape: which part may import which, what a wheel holds, and that importing it costs nothing.

The rule of imports: ``river_compile -> passes -> kernels``. Kernels know no graph and passes know no backend, so
``kernels/`` imports nothing of the other two and ``passes/`` imports only ``kernels/``, at module level or inside a
function. All of them call each other by their installed names (``river_compile.passes``), never by the folder's.
Neither files nor folders import each other in a circle, wherever in a file an import stands. For the
folders of C++ sources see `MAY_INCLUDE`.
"""

import ast
import importlib
import itertools
import re
import zipfile
from pathlib import Path

import pytest

from tests.support.layout import FOLDERS, OURS, ROOT, SOURCES, build_wheel, names_in, run_python
from tests.support.sources import circle, import_graph, imported_modules, part_of, parts_graph, read

MAY_IMPORT = {
    "river_compile": {"river_compile", "passes", "kernels"},
    "passes": {"passes", "kernels"},
    "kernels": {"kernels"},
}


def layer_of(module: str) -> str | None:
    """Returns the layer that an absolute module name belongs to, or None for other packages."""
    parts = module.split(".")
    if parts[0] in ("passes", "kernels"):
        return f"top-level {parts[0]}"
    if parts[0] != "river_compile":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("passes", "kernels") else "river_compile"


def forbidden_imports(source: str, layer: str, package: str) -> list[str]:
    """Returns the imports of `source`, a module of `layer`, that the rule forbids."""
    layers = {module: layer_of(module) for module in imported_modules(ast.parse(source), package)}
    return [module for module, imported in layers.items() if imported and imported not in MAY_IMPORT[layer]]


def test_imports_run_one_way():
    """No module imports against the arrow, nor anything by its folder's name."""
    found = {}
    for file in SOURCES:
        folder = file.relative_to(ROOT).parts[0]
        package = ".".join([FOLDERS[folder], *file.relative_to(ROOT / folder).parent.parts])
        found[str(file.relative_to(ROOT))] = forbidden_imports(file.read_text(encoding="utf-8"), folder, package)
    assert {file: names for file, names in found.items() if names} == {}


def test_what_tools_and_benchmarks_import_from_the_project_exists():
    """Their tests are a separate layer, so a name that moved would not show."""
    files = [path for folder in ("benchmarks", "examples", "tools", "tests") for path in (ROOT / folder).rglob("*.py")]
    froms = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    missing = [
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path, node in froms
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in OURS
        for alias in node.names
        if alias.name not in names_in(node.module)
    ]
    assert missing == []


def test_tools_never_import_benchmarks():
    """Benchmarks may import tools, so what both need lies in tools."""
    for file in (ROOT / "tools").rglob("*.py"):
        imported = imported_modules(ast.parse(file.read_text(encoding="utf-8")), "tools")
        assert not any(name.split(".")[0] == "benchmarks" for name in imported), file


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions and those for type checkers count too."""
    found = circle(import_graph(read()))
    assert not found, f"files import each other in a circle: {found}"


def test_no_folders_import_each_other_in_a_circle():
    """The subfolders form a layered whole: each can be understood with those below it."""
    graph = import_graph(read())
    found = circle(parts_graph(graph))
    hops = set(itertools.pairwise(found.split(" -> ")))
    files = [f"{a} imports {b}" for a in graph for b in graph[a] if (part_of(a), part_of(b)) in hops]
    assert not found, "\n".join([f"folders import each other in a circle: {found}", *files])


NATIVE = ROOT / "kernels/native/sources"
MAY_INCLUDE = {  # of each folder of C++ sources, those that its files include; phases.h lies above all of them
    ".": set(),
    "vectors": {".", "vectors"},
    "packing": {".", "vectors", "packing"},
    "kernels": {".", "vectors", "kernels"},
    "operators": {".", "vectors", "operators"},
}


def forbidden_includes(source: str, folder: str) -> list[str]:
    """Returns the includes of `source`, a C++ file of `folder`, that are against the arrow or not by a whole path."""
    names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', source, re.MULTILINE)
    return [n for n in names if str(Path(n).parent) not in MAY_INCLUDE[folder] or not (NATIVE / n).is_file()]


def test_includes_run_one_way():
    """The libraries of operators, of kernels and of packing know nothing of each other but phases.h."""
    files = [file for file in NATIVE.rglob("*") if file.is_file()]
    assert {str(file.parent.relative_to(NATIVE)) for file in files} == set(MAY_INCLUDE)
    found = {file: forbidden_includes(file.read_text(), str(file.parent.relative_to(NATIVE))) for file in files}
    assert not any(found.values()), {str(file): names for file, names in found.items() if names}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", '#include <cmath>\n\n#include "operators/tensors.h"'),
        ("operators", '#if defined(RIVER_ISA_AMX)\n# include "kernels/gemm_amx.h"\n#endif'),
        ("vectors", '#include "kernels/epilogue.h"'),
        ("vectors", '#include "dtypes.h"'),
        ("kernels", '#include "../phases.h"'),
    ],
)
def test_the_check_sees_forbidden_includes(folder, source):
    assert len(forbidden_includes(source, folder)) == 1


DOORS = {  # of each optional part, the modules of the package that import it; the package itself exports some names
    "cli.serving": {"cli.serve"},
    "decoding.assistant": {"decoding.sources"},
    "decoding.mtp": {"decoding.sources"},
    "decoding.continuous": {"", "cli.serving"},
    "evaluation": {"", "cli.commands"},
    "runtime.offload": {"building.assemble"},
    "runtime.tensor_parallel": {"", "runtime.processes"},
    "runtime.weight_store": {"runtime.offload"},
    "kernels.triton": {"lowering.lower"},
    "lowering.inductor": {"building.unsupported", "lowering.segments"},
    "twins.background": {"twins.pack", "twins.weights"},
    "api.export": {"", "cli.commands"},
}


@pytest.mark.core
@pytest.mark.parametrize("part", DOORS)
def test_what_is_optional_is_imported_through_its_doors(part):
    """The rule of CONTRIBUTING.md. A door may be closed, and none is opened without a line here."""
    whole, found = f"river_compile.{part}", set()
    for module, imported in import_graph(read()).items():
        inside = module == whole or module.startswith(f"{whole}.")
        if not inside and any(name == whole or name.startswith(f"{whole}.") for name in imported):
            name = module.removeprefix("river_compile").removeprefix(".")
            found.add("cli.serving" if name.startswith("cli.serving.") else name)
    assert found == DOORS[part]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_every_module_below_river_compile(wheel):
    """Every source file is in the wheel under its installed name, and no folder `passes` or `kernels` at its top."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in SOURCES:
        folder, *rest = file.relative_to(ROOT).parts
        assert "/".join([FOLDERS[folder].replace(".", "/"), *rest]) in names
    data = ("py.typed", "twins/default_texts.txt", "docs/troubleshooting.md")
    assert {f"river_compile/{name}" for name in data} <= names
    for folder in ("triton/templates", "native/sources"):
        texts = {path.relative_to(ROOT) for path in (ROOT / "kernels" / folder).rglob("*") if path.is_file()}
        assert texts
        assert {f"river_compile/{path.as_posix()}" for path in texts} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"river_compile"}


def test_a_wheel_registers_the_backend(wheel):
    """The wheel's metadata has the entry points by which TorchDynamo and lm-eval find the package, and the license."""
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(entry_points).decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    scripts = ["[console_scripts]", "river", "=", "river_compile.cli.app:main"]
    harness = ["[lm_eval.models]", "river", "=", "river_compile.evaluation.lm_eval_model:RiverLM"]
    backend = ["[torch_dynamo_backends]", "river", "=", "river_compile.backend:river"]
    assert text.split() == [*scripts, *harness, *backend]


def test_a_bare_checkout_imports_its_parts_at_no_cost_and_in_silence(tmp_path):
    """Without any installation the folders at the top import by the installed names; the package loads nothing."""
    code = """
import sys, river_compile
assert not {"torch", "triton", "transformers"} & set(sys.modules)
import river_compile.passes as p, river_compile.kernels as k
print(p.__file__, k.__file__)
"""
    done = run_python(code, tmp_path, ROOT)
    assert done.stdout.split() == [str(ROOT / "passes/__init__.py"), str(ROOT / "kernels/__init__.py")]
    assert done.stderr == ""


def test_no_module_hides_a_public_name():
    """Importing a submodule binds its name in the package, over a function of that name."""
    names = {entry.stem for entry in (ROOT / "river_compile").iterdir()}
    assert not names & set(importlib.import_module("river_compile").__all__)


def test_torch_logs_takes_the_package_name(tmp_path):
    """TORCH_LOGS walks all submodules before torch is imported: that ends, and sets the level of our loggers."""
    code = "import logging, torch; print(logging.getLogger('river_compile.passes').isEnabledFor(logging.DEBUG))"
    assert run_python(code, tmp_path, ROOT, TORCH_LOGS="+river_compile").stdout.split()[-1] == "True"


def test_every_public_name_loads():
    import river_compile

    assert all(getattr(river_compile, name) is not None for name in river_compile.__all__)


def test_every_name_of_the_api_page_is_public():
    """It says to import each from the package itself, but records and errors; errors have no entry each."""
    records = {"Candidate", "CycleRecord", "StepRecord"}  # (which users get from a rule or a trace)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: river_compile\.(?!errors$)[\w.]+\.(\w+)$", page, re.MULTILINE)
    assert len(documented) >= 20
    assert set(documented) - records <= set(importlib.import_module("river_compile").__all__)
