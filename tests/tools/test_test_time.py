"""The tool that says where a test run's time goes: it finds every function that it times, and prints its tables."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLEEPS = """
import subprocess, sys

def test_waits():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(1.2)"], check=True)
"""


def test_a_run_is_told_by_cause_and_test(tmp_path):
    """The whole product is imported, so a function that was renamed is missed here."""
    (tmp_path / "test_toy.py").write_text(SLEEPS)
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**around, "PYTHONPATH": str(ROOT)}
    for module in ("pytest -p tools.test_time -p no:cacheprovider -q test_toy.py", "tools.test_time"):
        command = [sys.executable, "-m", *module.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    seconds = {cells[0]: float(cells[1]) for cells in lines if len(cells) == 3 and cells[1][:1].isdigit()}
    assert seconds["subprocesses"] >= 1
    assert any("test_waits" in name for name in seconds)
