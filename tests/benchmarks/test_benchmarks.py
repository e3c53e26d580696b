"""The benchmarks' machinery without a model: worker processes, turns, medians, ratios, tables, files."""

import itertools
import json

import pytest

from benchmarks import common, decode, offload
from benchmarks.prompts import mixed, prompts

WORKER = """
import os, sys
from benchmarks import common

def fail():
    raise ValueError("tau is odd")

def die():
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def environment():
    print("chatter on standard output")
    return {"cache": os.environ["TORCHINDUCTOR_CACHE_DIR"], "threads": os.environ["OMP_NUM_THREADS"]}

def memory(mebibytes):
    before = common.peak_rss_bytes()
    held = b"x" * (mebibytes << 20)
    return {"before": before, "after": common.peak_rss_bytes()}

def echo(text):
    return {"text": text}

common.serve({handler.__name__: handler for handler in (echo, fail, die, environment, memory)})
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns a function that starts a worker of `WORKER`; all are closed at the end."""
    (tmp_path / "worker_of_a_test.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    workers = []

    def start(name):
        workers.append(common.Worker("worker_of_a_test", name, threads=1))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_a_worker_answers_in_order_and_survives_an_error(start):
    worker = start("row")
    assert worker.ask("echo", text="ä\n1") == {"text": "ä\n1"}
    with pytest.raises(common.WorkerFailed, match="row: ValueError: tau is odd"):
        worker.ask("fail")
    assert worker.ask("echo", text="2") == {"text": "2"}


def test_a_dead_worker_is_reported_with_its_last_words(start):
    worker = start("row")
    with pytest.raises(common.WorkerFailed, match=r"row: the process ended with status 3\nlast words"):
        worker.ask("die")


def test_workers_share_no_cache_and_their_chatter_is_no_answer(start):
    first, second = start("a").ask("environment"), start("b").ask("environment")
    assert first["cache"] != second["cache"]
    assert first["threads"] == "1"


def test_two_hundred_prompts_of_six_groups_differ():
    """Enough for the long proofs of exact mode; a group that has fewer than were asked for says so."""
    texts = list(itertools.islice(mixed(), 200))
    assert len(set(texts)) == 200
    assert texts[1] == prompts("code", 1)[0]
    with pytest.raises(ValueError, match=r"group 'math' has .* prompts, fewer than 1000"):
        prompts("math", 1000)


def test_json_files_are_whole_and_leave_no_scratch(tmp_path):
    path = tmp_path / "new" / "out.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_ratios_leave_out_what_was_not_measured():
    assert common.ratios({"a": 3.0, "b": 2.0}, [("a", "b"), ("a", "c")]) == {"a/b": 1.5}


def test_peak_memory_grows_with_what_the_process_held(start):
    memory = start("row").ask("memory", mebibytes=64)
    assert memory["after"] - memory["before"] > 60 * 2**20


def test_an_unknown_model_is_named(capsys):
    assert decode.main(["--model", "/no/such/folder"]) == 1
    assert "model='/no/such/folder' is neither a folder with a config.json" in capsys.readouterr().err


def test_offloading_is_compared_with_a_model_in_memory(monkeypatch, tmp_path, capsys):
    """Which rows are measured, the share that stays, and which texts are the plain model's."""
    asked = []

    def answer(self, command, options, exact, **job):
        asked.append((options, exact))
        moved = 6 * 10**6 if "offload" in options else 0
        row = {"prompt_s": 0.1, "decode_tokens_per_s": 50.0, "mean_depth": 2.0, "brought_in_bytes_per_token": moved}
        row["tokens"] = [1, 2] if options["threshold"] > 1 else [1, 3]
        return {"weights_bytes": 10**7, "resident_bytes": 10**7 - moved, "process_bytes": 10**8, **row}

    monkeypatch.setattr(common.Worker, "__init__", lambda self, *_: None)
    monkeypatch.setattr(common.Worker, "ask", answer)
    monkeypatch.setattr(common.Worker, "close", lambda self: None)
    (tmp_path / "config.json").write_text("{}")
    assert offload.main(["--model", str(tmp_path), "--offload", "2"]) == 0
    usual, never = {"threshold": 0.7}, {"threshold": 2.0, "offload": 2, "offload_policy": "fetch"}
    policies = [({**usual, "offload": 2, "offload_policy": policy}, False) for policy in ("exit", "fetch")]
    assert asked == [(usual, False), *policies, (never, False), (never, True)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[-4:]] == ["no", "no", "yes", "yes"]
    assert [line.split()[-7] for line in lines[-4:]] == ["40%"] * 4
