"""Every error and warning that reaches a user has an id, and docs/troubleshooting.md has a section for each id."""

import ast
import inspect
import itertools
import pickle
import re
import warnings

import pytest

from river_compile import errors
from river_compile.error_ids import TITLES
from river_compile.errors import RiverError
from river_compile.kernels.messages import with_id
from tests.support.layout import ROOT, SOURCES

PAGE = ROOT / "docs" / "troubleshooting.md"
REGISTRIES = (ROOT / "river_compile/error_ids.py", ROOT / "kernels/messages.py")
ID = re.compile(r"RC\d{3}")
CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RiverError)]


def calls(source: str):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def without_id(source: str) -> list[int]:
    """Return the lines of `warnings.warn` and `log.warning` whose message no `with_id` composes."""
    found = []
    for call in calls(source):
        if ast.unparse(call.func) in ("warnings.warn", "log.warning"):
            composed = {ast.unparse(part.func) for part in ast.walk(call) if isinstance(part, ast.Call)}
            named = {part.id for part in ast.walk(call) if isinstance(part, ast.Name)}
            if "with_id" not in composed and not named & assigned_by_with_id(source):
                found.append(call.lineno)
    return found


def assigned_by_with_id(source: str) -> set[str]:
    """Return the variables that take a result of `with_id` and nothing else."""
    values: dict[str, list[bool]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            composed = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "with_id"
            values.setdefault(node.targets[0].id, []).append(composed)
    return {name for name, composed in values.items() if all(composed)}


def sections(page: str) -> list[tuple[str, str, str]]:
    """Return anchor, id and title of each section of an id."""
    return re.findall(r'^<a id="([^"]+)"></a>\n\n### (\S+): (.+)$', page, re.MULTILINE)


def test_every_warning_carries_an_id():
    found = {str(file.relative_to(ROOT)): without_id(file.read_text(encoding="utf-8")) for file in SOURCES}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_the_ids_are_those_that_the_code_uses_each_registered_once_and_in_order():
    """An id in a string of the code is one that something raises or warns with."""
    used = set()
    for file in SOURCES:
        if file not in REGISTRIES:
            strings = (n.value for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Constant))
            used |= {value for value in strings if isinstance(value, str) and ID.fullmatch(value)}
    registered = [ID.findall(file.read_text(encoding="utf-8")) for file in REGISTRIES]
    assert used == set(TITLES)
    assert all(ids == sorted(set(ids)) for ids in registered)
    assert sorted(itertools.chain(*registered)) == list(TITLES)


def test_the_page_has_one_section_for_each_id():
    page = PAGE.read_text(encoding="utf-8")
    assert [(id, title) for _, id, title in sections(page)] == list(TITLES.items())
    assert [anchor for anchor, _, _ in sections(page)] == [id.lower() for id in TITLES]
    assert page.count('<a id="rc') == len(TITLES)
    assert set(re.findall(r"\(#(rc\d+)\)", page)) <= {id.lower() for id in TITLES}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_an_id_which_a_raise_can_replace(kind):
    if kind is RiverError or kind.__name__.startswith("_"):  # nothing raises these
        assert not hasattr(kind, "id")
        return
    assert kind.id in TITLES
    assert str(kind("No room. Make room.")) == f"{kind.id}: No room. Make room. See `river explain-error {kind.id}`"
    named = kind("No room", id="RC080")
    assert str(named) == with_id("RC080", "No room") == "RC080: No room. See `river explain-error RC080`"
    again = pickle.loads(pickle.dumps(named))
    assert (type(again), str(again), again.text) == (kind, str(named), "No room")
    assert issubclass(kind, (ValueError, RuntimeError, IndexError))


def test_no_two_classes_share_an_id():
    ids = [kind.id for kind in CLASSES if hasattr(kind, "id")]
    assert len(set(ids)) == len(ids)


def test_a_warning_of_the_kernels_begins_with_its_id(tmp_path, monkeypatch):
    """What `with_id` composes is what a user reads, whichever layer warns."""
    from river_compile.kernels.triton.tiles import read_table

    (tmp_path / "tiles.json").write_text("{")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert read_table(tmp_path / "tiles.json") == {}
    assert re.match(r"RC084: .*See `river explain-error RC084`$", str(said[0].message))
