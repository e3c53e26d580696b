"""What continuous integration runs: the Makefile's targets, and nothing that the Makefile does not know."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.decode_rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))

#: Stands in for the programs of the virtual environment: notes what is called, and fails on request.
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
echo "said by $2"
case "$*" in *"$FAILS"*) exit 3;; esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs a target with an environment of programs that do nothing; returns its status, output and calls."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "clang-format"):
        program = tmp_path / "bin" / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
    for stamp in (".created", ".installed-demo", ".installed-test"):
        (tmp_path / stamp).touch()

    def run(target: str, fails: str = "nothing fails", *settings: str) -> tuple[int, str, list[str]]:
        # Without the variables of a make that runs this test.
        environment = {**os.environ, "CALLS": str(tmp_path / "calls"), "FAILS": fails, "MAKEFLAGS": "", "LAYERS": ""}
        command = ["make", target, f"VENV={tmp_path}", *settings]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout, (tmp_path / "calls").read_text().splitlines()

    return run


def test_make_test_lints_checks_types_and_runs_the_tests(make):
    status, said, calls = make("test")
    assert status == 0, said
    for program in ("python -m ruff check", "python -m ruff format --check", "clang-format --dry-run -Werror"):
        assert any(call.startswith(program) for call in calls), calls
    assert {"python -m tools.typecheck", "python -m tools.prose"} <= {*calls}
    assert any(call.startswith("python -m mkdocs build --strict") for call in calls)
    assert any(call.startswith("python -m pytest") and "--slow" not in call for call in calls)
    assert any("--slow" in call for call in make("test-all")[2])


@pytest.mark.parametrize(
    "fails", ["ruff check", "ruff format", "--dry-run", "tools.typecheck", "tools.prose", "mkdocs"]
)
def test_make_test_fails_with_its_lint_and_says_so_after_the_tests(make, fails):
    status, said, _ = make("test", fails)
    assert status != 0
    assert "make lint FAILED, see above" in said
    assert said.index("said by pytest") < said.index("said by ruff") < said.index("make lint FAILED")


@pytest.mark.parametrize("installed", [True, False])
def test_make_test_arm_installs_what_is_missing_and_runs_the_tests(make, tmp_path, installed):
    tools = "make" if installed else "make no-such-program"
    installer = f"SUDO={tmp_path}/bin/python"
    status, said, calls = make("test-arm", "nothing fails", f"ARM_TOOLS={tools}", installer)
    assert status == 0, said
    *before, tests = calls
    assert tests == "python -m pytest --slow tests/kernels/native/test_phases.py"
    assert before == ([] if installed else ["python apt-get install --yes g++-aarch64-linux-gnu qemu-user"])
    assert make("test-arm", "apt-get", "ARM_TOOLS=no-such-program", installer)[0] != 0


def test_make_test_sanitizers_runs_the_slow_tests_and_tells_what_was_skipped(make):
    assert make("test-sanitizers")[2] == ["python -m pytest --slow -rs tests/kernels/native/test_sanitizers.py"]


def test_make_test_fails_with_a_test(make):
    status, said, _ = make("test", "pytest")
    assert status != 0
    assert "make lint FAILED" not in said


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_rows_and_modules_that_exist(workflow):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    for name, job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].items():
        used = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
        if name == "publish":
            assert used == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
            continue
        assert used[:2] == ["actions/checkout", "actions/setup-python"]
        assert {*used[2:]} <= {"actions/download-artifact", "actions/upload-artifact"}
        commands = " ".join(step.get("run", "") for step in job["steps"]).replace("\\\n", " ")
        assert {*re.findall(r"\bmake (\S+)", commands)} <= {*targets}
        modules = re.findall(r"-m ((?:benchmarks|tools)[.\w]+)", commands)
        assert all((ROOT / script).exists() for script in re.findall(r"python (tools/[\w/.]+)", commands))
        files = [ROOT / module.replace(".", "/") for module in modules]
        assert all(file.with_suffix(".py").exists() or (file / "__main__.py").exists() for file in files)
        rows = " ".join(re.findall(r"--rows ([\w\s]+)", commands)).split()
        assert {*rows} <= {*ROWS}


def test_only_a_tag_publishes_and_only_what_loads_under_both_ends_of_torchs_range():
    text = (ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    publish, torches = jobs["publish"], jobs["torches"]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert {"source", "wheel", "torches"} <= {*publish["needs"]}
    assert publish["permissions"] == {"id-token": "write"}  # trusted publishing: no stored secret
    assert "secrets." not in text
    tested = re.search(r"torch ([\d.]+) to ([\d.]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    oldest, newest = (version.rpartition(".")[0] for version in torches["strategy"]["matrix"]["torch"])
    assert (oldest, newest) == tested.groups()
    assert f"torch>={oldest}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "torch-abi-audit --check torch" in " ".join(step.get("run", "") for step in torches["steps"])


def test_the_package_and_the_citation_name_the_same_authors_and_keywords():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for author in citation["authors"]:
        assert f'name = "{author["name"]}"' in package
    assert all(f'    "{keyword}",\n' in package for keyword in citation["keywords"])
