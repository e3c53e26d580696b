"""Reads the product's sources: lines by folder, long files and functions, imports and their circles, hidden state.

Every import counts, those inside functions and those for type checkers too. Names are not resolved: hidden state is
found by how it is written (:func:`singletons`).
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The product's folders, and the names that they are installed under.
FOLDERS = {"river_compile": "river_compile", "passes": "river_compile.passes", "kernels": "river_compile.kernels"}
NATIVE = ("*.cpp", "*.h")  # C++ sources, anywhere in the product
LONG_FILE, LONG_FUNCTION = 420, 70  # lines

_CONTAINERS = ("dict", "list", "set", "deque", "defaultdict", "Counter", "OrderedDict", "local", "ContextVar")
_WRITES = ("add", "append", "clear", "extend", "pop", "popitem", "remove", "setdefault", "update")


@dataclass(frozen=True)
class Source:
    """One Python file of the product."""

    module: str  # its installed name
    path: str  # from the root
    text: str

    @property
    def package(self) -> str:
        """The package that its relative imports start from."""
        return self.module if Path(self.path).name == "__init__.py" else self.module.rpartition(".")[0]

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def read(root: Path = ROOT) -> dict[str, Source]:
    """Return the product's Python files by their installed names."""
    found = {}
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            module = module_of(file, root)
            found[module] = Source(module, str(file.relative_to(root)), file.read_text(encoding="utf-8"))
    return found


def module_of(file: Path, root: Path = ROOT) -> str:
    """Return the installed name of a product file."""
    folder, *rest = file.relative_to(root).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


def part_of(module: str) -> str:
    """Return the subfolder that a module lies in, or the module itself if it lies in none."""
    root = max((name for name in FOLDERS.values() if f"{module}.".startswith(f"{name}.")), key=len)
    return ".".join(module.split(".")[: root.count(".") + 2])


# Lines.


def lines_by_folder(sources: Mapping[str, Source]) -> dict[str, int]:
    """Return lines of Python by folder, subfolders by themselves."""
    counted: Counter[str] = Counter()
    for source in sources.values():
        counted[str(Path(source.path).parent)] += source.lines
    return dict(sorted(counted.items()))


def native_lines(root: Path = ROOT) -> int:
    """Return lines of C++."""
    files = [file for folder in FOLDERS for pattern in NATIVE for file in (root / folder).rglob(pattern)]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def long_files(sources: Mapping[str, Source]) -> dict[str, int]:
    """Return the files of more than `LONG_FILE` lines."""
    return {source.path: source.lines for source in sources.values() if source.lines > LONG_FILE}


def long_functions(sources: Mapping[str, Source]) -> dict[str, int]:
    """Return the functions of more than `LONG_FUNCTION` lines, decorators left out."""
    return {
        f"{source.path}:{node.name}": lines
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > LONG_FUNCTION
    }


# Imports.


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the absolute name of everything that a module of `package` imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            # `from river_compile import passes` names a subpackage, `from river_compile import trace` does not.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


def import_graph(sources: Mapping[str, Source]) -> dict[str, set[str]]:
    """Return which modules each one imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        found = set()
        for name in imported_modules(source.tree, source.package):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {module, ""}
    return graph


def parts_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the same between subfolders; modules outside of any stand for themselves."""
    parts: dict[str, set[str]] = {}
    for module, imported in graph.items():
        parts.setdefault(part_of(module), set()).update(map(part_of, imported))
    return {part: imported - {part} for part, imported in parts.items()}


def circle(graph: Mapping[str, set[str]]) -> str:
    """Return a circle of imports, "a -> b -> a", empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


# Hidden state.


def singletons(sources: Mapping[str, Source]) -> list[str]:
    """Return every place that keeps or fetches state which no signature shows, as "path:line name".

    These are calls ``.of(Class)`` of a registry by class, and mutable objects at the top of a module. The latter are
    containers that are empty there or that a function writes to, instances of the product's classes that change, and
    ``global``.
    """
    changing = {name for source in sources.values() for name in _changing_classes(source.tree)}
    found = []
    for source in sources.values():
        places = [*_registry_calls(source.tree), *_module_state(source.tree, changing), *_globals(source.tree)]
        found += [f"{source.path}:{line} {name}" for line, name in sorted(places)]
    return found


def _registry_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "of":
            name = _name(node.args[0]) if len(node.args) == 1 else ""
            if name[:1].isupper() and not name.isupper():
                yield node.lineno, f".of({name})"


def _module_state(tree: ast.Module, changing: set[str]) -> Iterator[tuple[int, str]]:
    written = set(_written(tree))
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name, made = _name(target), _name(node.value.func) if isinstance(node.value, ast.Call) else ""
            is_container = made.startswith("Weak") or made in _CONTAINERS
            is_empty = isinstance(node.value, (ast.Dict, ast.List)) and not ast.unparse(node.value)[1:-1]
            if name and name != "__all__" and (is_container or is_empty or made in changing or name in written):
                yield node.lineno, name


def _globals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from ((node.lineno, f"global {name}") for name in node.names)


def _changing_classes(tree: ast.Module) -> Iterator[str]:
    """Yield the classes that assign to attributes of `self` after construction, or start with an empty container."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and _changes(method):
                    yield node.name
                    break


def _changes(method: ast.FunctionDef) -> bool:
    first = method.args.args[0].arg if method.args.args else ""
    for node in ast.walk(method):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            to_self = isinstance(target, ast.Attribute) and _name(target.value) == first == "self"
            if to_self and method.name not in ("__init__", "__post_init__", "__new__"):
                return True
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Dict, ast.List)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if method.name == "__init__" and isinstance(target, ast.Attribute) and not ast.unparse(node.value)[1:-1]:
                return True
    return False


def _written(tree: ast.Module) -> Iterator[str]:
    """Yield the names that functions of a module store items in, or call a container's changing methods of.

    A function's own names are not yielded.
    """
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        nodes = [*ast.walk(function)]
        own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        for node in nodes:
            changed: ast.expr | None = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                changed = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _WRITES:
                changed = node.func.value
            if isinstance(changed, ast.Name) and changed.id not in own:
                yield changed.id


def _name(node: ast.expr) -> str:
    """Return a plain name, of a dotted one or a subscripted one its last part; "" for other expressions."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
