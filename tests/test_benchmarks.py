"""The benchmarks' machinery without a model: worker processes, turns, medians, ratios, tables, files."""

import json
import time

import pytest

from benchmarks import common, decode

ROOT = decode.Path(__file__).resolve().parent.parent
WORKER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import common

def fail():
    raise ValueError("tau is odd")

def die():
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def environment():
    print("chatter on standard output")
    return {{"cache": os.environ["TORCHINDUCTOR_CACHE_DIR"], "threads": os.environ["OMP_NUM_THREADS"]}}

def memory(mebibytes):
    before = common.peak_rss_bytes()
    held = b"x" * (mebibytes << 20)
    return {{"before": before, "after": common.peak_rss_bytes()}}

def echo(text):
    return {{"text": text}}

common.serve({{handler.__name__: handler for handler in (echo, fail, die, environment, memory)}})
"""


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts a worker of `WORKER`; all are closed at the end."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    workers = []

    def start(name):
        workers.append(common.Worker(script, name, threads=1))
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


def test_json_files_are_whole_and_leave_no_scratch(tmp_path):
    path = tmp_path / "new" / "out.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_ratios_leave_out_what_was_not_measured():
    assert common.ratios({"a": 3.0, "b": 2.0}, [("a", "b"), ("a", "c")]) == {"a/b": 1.5}


def test_tables_align_numbers_right_and_show_gaps(capsys):
    common.print_table(["", "tokens/s"], [["eager", 1.0], ["llama_cpp", None]])
    assert capsys.readouterr().out.splitlines() == [
        "           tokens/s",
        "---------  --------",
        "eager          1.00",
        "llama_cpp         -",
    ]


def test_peak_memory_grows_with_what_the_process_held(start):
    memory = start("row").ask("memory", mebibytes=64)
    assert memory["after"] - memory["before"] > 60 * 2**20


class FakeWorker:
    """Stands in for `common.Worker`: notes who was asked what and answers with growing speeds."""

    log: list = []  # noqa: RUF012  (shared by all on purpose)

    def __init__(self, script, name, threads):
        self.name, self.rounds = name, 0

    def ask(self, command, **arguments):
        self.log.append((command, self.name))
        if command == "prepare":
            return {"first_token_s": 1.0, "second_token_s": 2.0, "mean_depth": 3.0}
        self.rounds += 1
        return {"tokens_per_s": [1.0, 9.0, 4.0][self.rounds - 1], "peak_rss_bytes": 2**20}

    def close(self):
        self.log.append(("close", self.name))


def test_repeats_take_turns_and_the_median_counts(monkeypatch, tmp_path, capsys):
    """Rows are prepared one by one, measured in rounds, and the JSON holds medians, ratios and absent rows."""
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(common, "Worker", FakeWorker)
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out.json"
    rows = ["eager", "river", "llama_cpp"]
    status = decode.main(["--model", str(tmp_path), "--rows", *rows, "--repeats", "3", "--json", str(out)])
    assert status == 0
    turn = [("measure", "eager"), ("measure", "river")]
    assert FakeWorker.log[:2] == [("prepare", "eager"), ("prepare", "river")]
    assert FakeWorker.log[2:8] == turn * 3
    assert sorted(FakeWorker.log[8:]) == [("close", "eager"), ("close", "river")]
    outcome = json.loads(out.read_text())
    assert outcome["rows"]["river"]["decode_tokens_per_s"] == 4.0
    assert outcome["ratios"] == {"river/eager": 1.0}
    assert list(outcome["absent"]) == ["llama_cpp"]
    assert "river/eager" in capsys.readouterr().out


def test_an_unknown_model_is_named(capsys):
    assert decode.main(["--model", "/no/such/folder"]) == 1
    assert "model='/no/such/folder' is neither one of" in capsys.readouterr().err


def test_llama_cpp_needs_its_package_and_a_gguf_file(tmp_path, monkeypatch, capsys):
    """The row is absent with its reason, and a GGUF file that does not exist is named."""
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--model", str(tmp_path), "--rows", "llama_cpp"]
    options = decode._parse(arguments)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    assert "is not installed" in decode._absent_rows(options)["llama_cpp"]
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: object())
    assert "did not come from a GGUF file" in decode._absent_rows(options)["llama_cpp"]
    assert decode.main([*arguments, "--gguf", "/no/such.gguf"]) == 1
    assert "--gguf /no/such.gguf is no file" in capsys.readouterr().err


def test_numbers_too_small_are_refused(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--new-tokens", "1"])
    assert "1 is too small; give 2 or more" in capsys.readouterr().err


def test_the_torch_runner_times_a_tiny_model_without_river():
    """The plain row runs end to end: two stamps for the first call, the full depth, a positive rate."""
    from tests.families import make, prompt

    job = {"backend": "eager", "options": {}, "new_tokens": 4}
    runner = decode.TorchRunner(make("llama", layers=2), prompt(), job)
    first, second = runner.first_call()
    assert 0 < first < second
    assert runner.warm_up() == 2.0
    start = time.perf_counter()
    assert runner.rate() > 3 / (time.perf_counter() - start)


def test_the_llama_cpp_runner_takes_no_token_too_many():
    """Every generation starts from a clean state and pulls exactly the tokens it times."""

    class Llama:
        pulled, resets = 0, 0

        def reset(self):
            self.resets += 1

        def generate(self, tokens, **options):
            assert (tokens, options["temp"]) == ([1, 2], 0.0)
            while True:
                self.pulled += 1
                yield 5

    runner = decode.LlamaCppRunner(Llama(), [1, 2], {"new_tokens": 4})
    first, second = runner.first_call()
    assert 0 < first < second
    assert runner.warm_up() is None
    assert runner.rate() > 0
    assert (runner.llama.pulled, runner.llama.resets) == (2 + 4 + 4, 3)
