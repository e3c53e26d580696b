"""docs/tour.md names files and definitions that are there, and stays a tour."""

import ast
import re

import pytest

from tests.support.layout import ROOT

PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
FILE = r"`((?:river_compile|passes|kernels)/[\w/]+\.py)`"
ANCHORS = [
    (file, name)
    for file, names in re.findall(rf"{FILE}:\s+((?:`[\w.]+`(?:,\s+)?)+)", PAGE)
    for name in re.findall(r"`([\w.]+)`", names)
]


def definitions(file: str) -> set[str]:
    """Returns the classes and functions of a file, methods with their class."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            methods = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            found |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.core
@pytest.mark.parametrize(("file", "name"), ANCHORS, ids=lambda part: part)
def test_what_the_tour_names_is_where_it_says(file, name):
    assert name in definitions(file)


@pytest.mark.core
def test_the_tour_is_short():
    """Nine steps, at most 120 lines, and every file that it names exists."""
    assert len(ANCHORS) > 15
    assert re.findall(r"^(\d)\. ", PAGE, re.MULTILINE) == [str(number) for number in range(1, 10)]
    assert PAGE.count("\n") <= 120
    assert all((ROOT / file).is_file() for file in re.findall(FILE, PAGE))
