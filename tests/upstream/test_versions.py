"""What is said about versions: the warning, pyproject's floors and README's table agree with what was tested."""

import re
from importlib import metadata, util
from pathlib import Path

import pytest

import river_compile.backend  # (the first import reads versions of others)
from river_compile import RiverWarning
from river_compile.upstream import versions
from river_compile.upstream.versions import PYTHON, TESTED
from tools import compat

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def newest(monkeypatch):
    """Installed is the newest tested version of everything, with a patch number, but for what a test changes."""
    found = {name: f"{tested.newest}.7+cpu" for name, tested in TESTED.items()}
    monkeypatch.setattr("platform.python_version", lambda: found[PYTHON])
    monkeypatch.setattr(metadata, "version", lambda name: found[name])
    return found


def test_tested_versions_are_not_mentioned(newest, recwarn):
    versions.warn_of_untested()
    newest.update({name: tested.oldest for name, tested in TESTED.items()})
    versions.warn_of_untested()
    assert not recwarn.list


def import_anew(module):
    """Runs a module's code as its first import does, in a separate module."""
    spec = util.find_spec(module.__name__)
    spec.loader.exec_module(util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.10.1"), ("torch", "2.16.0.dev20261101"), ("transformers", "6.0"), ("triton", "4.0"), (PYTHON, "3.9")],
)
def test_the_import_of_the_backend_names_what_lies_outside(name, version, newest):
    newest[name] = version
    oldest, last = TESTED[name]
    wanted = rf"not tested with {name} {re.escape(version)} \(tested: {oldest} to {re.escape(last)}\)\. "
    with pytest.warns(RiverWarning, match=wanted) as caught:
        import_anew(river_compile.backend)
    assert len(caught) == 1


def test_what_is_not_installed_is_not_mentioned(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    assert list(versions.untested(missing)) == []


def test_the_floors_of_pyproject_are_the_oldest_tested_versions():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={TESTED[PYTHON].oldest}"' in text
    for name in TESTED.keys() - {PYTHON}:
        assert re.findall(rf'"{name}>=([\d.]+)', text) == [TESTED[name].oldest]


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/hardware.md"])
def test_documents_state_the_tested_versions(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    for name, (oldest, newest) in TESTED.items():
        assert re.search(rf"(?i)\b{name} {oldest} to {newest}\b", text), name


class TestCompat:
    """`make compat` on corners whose programs do nothing."""

    CORNER = compat.Corner("corner", "3.10", ("torch==2.11.0",))

    @pytest.fixture
    def ran(self, monkeypatch):
        """The commands that were called; each succeeds, but for those with a word in `fails`."""
        commands, self.fails = [], "nothing"

        def status(command, **environment):
            commands.append(command)
            return int(self.fails in command)

        monkeypatch.setattr(compat, "_status", status)
        monkeypatch.setattr(compat, "CORNERS", (self.CORNER,))
        monkeypatch.setattr(compat, "find_python", lambda version: f"python{version}")
        return commands

    def test_a_corner_installs_its_versions_and_runs_the_core(self, ran, capsys):
        assert compat.main([]) == 0
        assert ran[0][:3] == ["python3.10", "-m", "venv"]
        assert ran[1][-2:] == [f"{ROOT}[test]", "torch==2.11.0"]
        assert ran[3][1:5] == ["-m", "pytest", "-m", "core"]
        assert "| corner | passed |" in capsys.readouterr().out

    @pytest.mark.parametrize("step", ["venv", "pip", "pytest"])
    def test_a_step_that_fails_fails_the_run(self, step, ran):
        self.fails = step
        assert compat.main([]) == 1

    def test_a_missing_python_is_a_skip_in_plain_sight_and_no_success(self, ran, monkeypatch, capsys):
        monkeypatch.setattr(compat, "find_python", lambda version: None)
        assert compat.main([]) == 1
        assert "corner: not available here" in capsys.readouterr().out
        assert ran == []

    def test_the_oldest_corner_has_the_floors(self):
        oldest = compat.CORNERS[0]
        assert oldest.python == TESTED[PYTHON].oldest
        wanted = [f"{name}=={TESTED[name].oldest}.0" for name in ("torch", "transformers")]
        assert list(oldest.requirements) == wanted
        assert compat.CORNERS[-1].python == TESTED[PYTHON].newest
