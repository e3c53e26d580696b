"""Reads the product's sources: imports and their circles.

Every import counts, those inside functions and those for type checkers too.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The product's folders, and the names that they are installed under.
FOLDERS = {"river_compile": "river_compile", "passes": "river_compile.passes", "kernels": "river_compile.kernels"}


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
