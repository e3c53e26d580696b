"""The benchmarks' machinery without a model: worker processes, turns, medians, ratios, tables, files."""

import itertools
import json
import math
import sys

import pytest
import torch

from benchmarks import (
    common,
    decode,
    memory,
    offload,
    roofline,
    schedule,
)
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_tells_mapped_from_own(tmp_path):
    """The pages of a file that were touched, and none of a file that is not mapped."""
    file, other = tmp_path / "a file", tmp_path / "other"
    for path in (file, other):
        path.write_bytes(bytes(1 << 20))
    mapped = torch.from_file(str(file), shared=False, size=1 << 20, dtype=torch.uint8)
    assert mapped[: 1 << 19].sum() == 0
    found = memory.of_file(file)
    assert 1 << 19 <= found["rss"] <= 1 << 20
    assert found["anonymous"] == 0
    mapped[:4096] = 1
    assert memory.of_file(file)["anonymous"] == 4096
    assert memory.of_file(other) == dict.fromkeys(("rss", "pss", "anonymous"), 0)
    assert memory.of_process()["rss"] > found["rss"]


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


def test_an_unknown_model_is_named(capsys):
    assert decode.main(["--model", "/no/such/folder"]) == 1
    assert "model='/no/such/folder' is neither a folder with a config.json" in capsys.readouterr().err


def test_numbers_too_small_are_refused(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--new-tokens", "1"])
    assert "1 is too small; give 2 or more" in capsys.readouterr().err


def test_a_token_costs_what_its_blocks_cost():
    """Bytes of Llama-3.1-8B by hand: 16-bit weights and the cache for full depth, 4.5 bits a weight for depth 0."""
    line = roofline.Roofline("llama-3.1-8b", context=1024, group_size=64)
    weights = 32 * (4096 * (6144 + 4096 + 3 * 14336) + 2 * 4096)
    head, cache = 2 * 4096 * 128256, 32 * 2 * 2 * 1024 * 1024
    assert math.isclose(line.token(None).bytes, 2 * weights + head + cache, rel_tol=0.01)
    assert math.isclose(line.token(0).bytes, weights * (0.5 + 4 / 64) + head + cache, rel_tol=0.01)
    assert line.token(32) == line.token(None)
    deeper = [line.token(depth).bytes for depth in range(33)]
    assert len({b - a for a, b in itertools.pairwise(deeper)}) == 1
    assert line.token(0).launches == 32 * 5 + 1


@pytest.mark.slow
def test_the_schedule_draws_each_depth(capsys):
    with torch.no_grad():
        assert schedule.main(["--layers", "2", "--timeline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("  host")] == ["L..........?L"] * 2


@pytest.mark.slow
def test_the_estimate_prints_costs_targets_and_the_schedule(tmp_path, capsys, monkeypatch):
    """Llama-3.1-8B with the schedule of four blocks: what a target needs is its share of the roofline's speed."""
    out = tmp_path / "out.json"
    arguments = [
        "--random",
        "llama-3.1-8b",
        "--estimate",
        "--blocks",
        "4",
        "--depths",
        "never",
        "0",
        "3",
        "--bandwidth",
    ]
    assert decode.main([*arguments, "3350", "--json", str(out)]) == 0
    outcome = json.loads(out.read_text())["models"]["llama-3.1-8b"]
    never, left, third = outcome["tokens"]
    assert (never["exit"], left["exit"], third["exit"]) == ("never", "depth 0", "depth 3")
    assert 215 < never["tokens_per_s"] < 225  # 15.2 GB at 3350 GB/s
    for row in (never, left, third):
        assert 0.4 * row["tokens_per_s"] < row["modelled_tokens_per_s"] < row["tokens_per_s"]
    assert math.isclose(left["needs"], 330 / left["tokens_per_s"])
    assert math.isclose(1 / 300, third["seconds"] + third["launches"] * third["seconds_per_launch"])
    steps = {(row["exit"], row["how"]): (row["graphs"], row["flags"]) for row in outcome["schedule"]}
    assert steps == {
        ("never", "forced"): (1, 0),
        ("never", "asked"): (4, 3),
        ("depth 0", "forced"): (1, 0),  # (the embedding stage is in it)
        ("depth 3", "forced"): (2, 0),
        ("depth 3", "asked"): (4, 3),
    }
    printed = capsys.readouterr().out
    assert "Nothing was run on a GPU. Bytes at 3350 GB/s" in printed
    assert "51%" in printed  # what 330 tokens/s need


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "name the models to build: --random llama-3.2-1b llama-3.2-3b llama-3.1-8b"),
        (["--estimate"], "name the models to build"),
        (["--estimate", "--record", "some"], "--record keeps numbers of a CPU; use --json for those of a GPU"),
        (["--random", "llama-9", "--estimate"], "--random llama-9 is not a model that can be built"),
        (["--random", "llama-3.2-1b"], "--random needs --device cuda, or --estimate"),
        (["--random", "llama-3.2-1b", "--device", "cuda"], "torch sees no GPU here; --estimate prints"),
        (["--random", "llama-3.2-1b", "--estimate", "--depths", "16"], "--depths 16 lies after the last exit of 16"),
    ],
)
def test_what_the_gpu_benchmark_cannot_do_is_named(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode.main(arguments) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("bandwidth", ["0", "-3", "nan"])
def test_a_bandwidth_is_positive(bandwidth, capsys):
    with pytest.raises(SystemExit):
        decode.main(["--random", "llama-3.2-1b", "--estimate", "--bandwidth", bandwidth])
    assert f"{bandwidth} is not a bandwidth" in capsys.readouterr().err


def test_drafts_hold_with_a_probability(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--random", "llama-3.2-1b", "--estimate", "--hold", "1.5"])
    assert "1.5 is not a probability" in capsys.readouterr().err


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
