"""`benchmarks.decode`: its prompts, the turns of its rows, what it makes of their times, and rows that cannot run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import common, decode, decode_rows, peers, prompt_sets, torch_runner
from benchmarks.prompt_sets import Prompt
from river_compile import system
from river_compile.reporting import dry_run
from tests.support.lowerings import OPERATORS
from tools import demo_models, records


class FakeWorker:
    """Stands in for `common.Worker`: notes who was asked what, and answers with growing speeds."""

    log: list = []  # noqa: RUF012  (shared by all on purpose)
    warmed: list = []  # noqa: RUF012  (likewise)
    speeds = (1.0, 9.0, 4.0)
    fails = ""

    def __init__(self, module, name, threads, caches=None, python=None):
        self.name, self.rounds, self.file = name, 0, ""

    def ask(self, command, **arguments):
        self.log.append((command, self.name))
        if (command, self.name) == ("prepare", self.fails):
            raise common.WorkerFailed(f"{self.name}: no memory\nmore words")
        if command == "prepare":
            self.file = arguments.get("file", "")
            self.warmed.append(arguments["prompts"])
            return {"first_token_s": 1.0, "second_token_s": 2.0}
        if command == "facts":
            return {"mean_depth": 3.0, "peak_rss_bytes": 2**20, "target_bits": 12}
        self.rounds += 1
        speed = 20.0 if "Q4_K_M" in self.file else self.speeds[(self.rounds - 1) // 2 % 3]
        times = [0.5, 0.5 + 1 / speed]
        made = {"tokens": [1, 2 + self.rounds % 2 * (self.name == "exact")], "times": times}
        if self.name == "exact":  # of the second prompt all drafts are rejected
            kept = {"lookup": 2, "river": 3} if arguments["ids"] == [1, 2] else {}
            made |= {"drafted": {"lookup": 4, "river": 4}, "emitted": {"backbone": 5, **kept}}
        return made

    def close(self):
        self.log.append(("close", self.name))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Workers, prompts and converted files that cost nothing; gives the folder of a model."""
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "warmed", [])
    monkeypatch.setattr(FakeWorker, "fails", "")
    monkeypatch.setattr(common, "Worker", FakeWorker)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(system, "bandwidth", lambda: 50e9)
    some = [Prompt("chat", 32, [1, 2]), Prompt("code", 32, [1, 2, 3, 4])]
    monkeypatch.setattr(prompt_sets, "encoded", lambda folder, options: some)
    monkeypatch.setattr(decode, "memory_speed", lambda *_: {"bandwidth_bytes_per_s": 6e10, "bandwidth_row": "eager"})
    monkeypatch.setattr(peers, "why_not", lambda name: "" if "llama" in name else f"{name} is not installed")
    monkeypatch.setattr(peers, "converted", lambda name, source, kind: Path(f"/files/{kind}.gguf"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").touch()
    return tmp_path


def run(folder, *more):
    arguments = ["--model", str(folder), "--gguf", str(folder / "model.gguf"), *more]
    return decode.main([*arguments, "--json", str(folder / "out.json")])


def test_rows_take_turns_and_prompts_have_medians_and_a_range(fake, capsys):
    """Of each prompt the median over rounds; over prompts the median, the least and the most, in the records too."""
    assert run(fake, "--rows", "eager", "fast", "--repeats", "3", "--new-tokens", "2", "--record", "some") == 0
    assert FakeWorker.log[:2] == [("prepare", "eager"), ("prepare", "fast")]
    assert FakeWorker.log[2:8] == [("generate", "eager")] * 2 + [("generate", "fast")] * 2 + [("generate", "eager")] * 2
    assert sorted(FakeWorker.log[-2:]) == [("close", "eager"), ("close", "fast")]
    outcome = json.loads((fake / "out.json").read_text())
    row = outcome["rows"]["fast"]
    assert row["decode_tokens_per_s"] == pytest.approx(4.0)
    assert row["contexts"]["32"]["all"]["prompt_tokens_per_s"] == pytest.approx(6.0)  # of 4 and 8
    assert row["contexts"]["32"]["all"]["most_prompt_tokens_per_s"] == pytest.approx(8.0)
    assert outcome["ratios"] == {"fast/eager": pytest.approx(1.0)}
    kept = {(r["row"], r["key"]): r["value"] for r in records.read(fake / "results" / "some.jsonl")}
    assert kept["fast/32/code", "prompt_tokens_per_s"] == pytest.approx(8.0)
    assert kept["fast", "target_bits"] == 12
    page = capsys.readouterr().out
    assert "Memory at 60 GB/s, which eager read" in page
    assert "6.0 (4.0–8.0)" in page


def test_a_peer_runs_with_the_fastest_of_its_files(fake, capsys):
    """Each is tried in its own process; the winner's name is in the table and in the records."""
    assert run(fake, "--rows", "llama_cpp_best4", "--repeats", "1", "--new-tokens", "2", "--record", "some") == 0
    assert FakeWorker.log.count(("prepare", "llama_cpp_best4")) == 4
    kept = {(r["row"], r["key"]): r["value"] for r in records.read(fake / "results" / "some.jsonl")}
    assert kept["llama_cpp_best4", "choice"] == "Q4_K_M"
    assert kept["llama_cpp_best4/tried", "Q4_K_M"] == pytest.approx(20.0)
    assert "llama_cpp_best4 (Q4_K_M)" in capsys.readouterr().out


def test_drafts_are_compared_with_the_same_program_without(fake, capsys):
    rows = ("no_draft", "exact", "llama_cpp_server_bf16", "llama_cpp_draft_itself")
    assert run(fake, "--rows", *rows, "--repeats", "1", "--new-tokens", "2") == 0
    found = json.loads((fake / "out.json").read_text())["rows"]
    assert [found[row].get("same_text") for row in rows] == [None, 0.5, None, 1.0]
    page = capsys.readouterr().out
    assert "1 of 2" in page
    assert "2 of 2" in page


def test_the_tokens_of_exact_mode_are_counted_by_source_and_kind(fake, capsys):
    """Of the last round, in the records too; other rows have no such numbers."""
    rows = ("no_draft", "exact")
    assert run(fake, "--rows", *rows, "--repeats", "2", "--new-tokens", "2", "--record", "some") == 0
    found = json.loads((fake / "out.json").read_text())["rows"]
    cells = found["exact"]["contexts"]["32"]
    assert [cells[kind]["accepted_share"] for kind in ("all", "chat", "code")] == [5 / 16, 5 / 8, 0.0]
    assert cells["all"]["tokens"] == {"lookup": 2, "assistant": 0, "river": 3, "backbone": 10}
    assert (found["exact"]["accepted_share"], found["no_draft"]["accepted_share"]) == (5 / 16, None)
    assert "tokens" not in found["no_draft"]["contexts"]["32"]["all"]
    kept = {(r["row"], r["key"]): r["value"] for r in records.read(fake / "results" / "some.jsonl")}
    assert (kept["exact/32/chat/tokens", "river"], kept["exact", "accepted_share"]) == (3, 5 / 16)
    page = capsys.readouterr().out.partition("Sources of the tokens")[2]
    assert "exact  code                0.00       0            0       0    5" in page


def test_an_assistant_is_the_smaller_model_that_is_known(fake, monkeypatch):
    """Its folder goes to the workers of the rows that it drafts for."""
    monkeypatch.setitem(demo_models.SMALLER, str(fake), "a small one")
    monkeypatch.setattr(demo_models, "resolve", lambda name: f"/models/{name}")
    options = argparse.Namespace(model=str(fake), gguf=None)
    for name, drafts in (("exact_assistant", decode_rows.SMALL), ("exact_both", decode_rows.BOTH)):
        row = decode_rows.ROWS[name]
        assert (row.drafts, decode_rows.why_not(row, options)) == (drafts, "")
        wanted = {"folder": str(fake), "assistant": "/models/a small one"}
        assert decode_rows.choices(row, fake, options) == {"": wanted}
    assert decode_rows.choices(decode_rows.ROWS["exact"], fake, options) == {"": {"folder": str(fake)}}
    monkeypatch.delitem(demo_models.SMALLER, str(fake))
    assert "no smaller model" in decode_rows.why_not(row, options)


def test_a_peer_that_fails_or_is_not_there_is_absent_with_its_reason(fake, monkeypatch, capsys):
    """The other rows are measured; one of River's that fails ends the command."""
    monkeypatch.setattr(FakeWorker, "fails", "llama_cpp")
    rows = ("eager", "llama_cpp", "vllm", "llama_cpp_draft_small")
    assert run(fake, "--rows", *rows, "--repeats", "1", "--new-tokens", "2") == 0
    outcome = json.loads((fake / "out.json").read_text())
    assert list(outcome["rows"]) == ["eager"]
    assert outcome["absent"] == {
        "llama_cpp": "llama_cpp: no memory",
        "vllm": "vllm is not installed",
        "llama_cpp_draft_small": "no smaller model with the same tokens is known",
    }
    assert "vllm: absent, vllm is not installed" in capsys.readouterr().out
    monkeypatch.setattr(FakeWorker, "fails", "eager")
    assert run(fake, "--rows", "eager") == 1


def test_one_process_at_a_time_if_memory_is_short(fake):
    assert run(fake, "--rows", "eager", "fast", "--repeats", "1", "--new-tokens", "2", "--one-process") == 0
    asked = ("prepare", "generate", "generate", "facts", "close")
    assert FakeWorker.log == [(command, row) for row in ("eager", "fast") for command in asked]


def test_a_long_prompt_may_be_left_out_of_the_warm_up(fake):
    assert run(fake, "--rows", "eager", "--repeats", "1", "--new-tokens", "2") == 0
    assert run(fake, "--rows", "eager", "--repeats", "1", "--new-tokens", "2", "--warm-up-first") == 0
    assert FakeWorker.warmed == [[[1, 2], [1, 2, 3, 4]], [[1, 2]]]


def test_a_gguf_file_that_is_not_there_is_named(fake, capsys):
    assert decode.main(["--model", str(fake), "--gguf", "/no/such.gguf", "--rows", "llama_cpp"]) == 1
    assert "--gguf /no/such.gguf is not a file" in capsys.readouterr().err


def test_peers_need_a_file_and_one_text_at_a_time(fake):
    def reason(row, *more):
        return decode_rows.why_not(decode_rows.ROWS[row], decode._parse(["--model", str(fake), *more]))

    assert "did not come from a GGUF file" in reason("llama_cpp")
    assert "measured on a CPU" in reason("llama_cpp", "--device", "cuda")
    assert "one text at a time" in reason("llama_cpp", "--batch", "2")
    assert reason("eager") == ""


def test_no_prompt_is_calibration_text():
    text = (Path(dry_run.__file__).parents[1] / "twins" / "default_texts.txt").read_text()
    prompts = [prompt for prompts in prompt_sets.KINDS.values() for prompt in prompts]
    assert (len(set(prompts)), list(prompt_sets.KINDS)) == (12, ["chat", "code", "story", "edit"])
    assert not any(prompt in text for prompt in prompts)


def test_a_context_fills_the_prompt_to_its_length(smollm2_folder):
    """The question stays whole at the end, each prompt has another document, and a long question has none."""
    options = decode._parse(["--contexts", "32", "300", "--of-each", "2", "--kinds", "chat", "edit"])
    prompts = prompt_sets.encoded(smollm2_folder, options)
    assert [prompt.context for prompt in prompts] == [32] * 4 + [300] * 4
    assert all(len(prompt.ids) == 300 for prompt in prompts[4:])
    bare, filled = prompts[0].ids, prompts[4].ids
    assert (filled[-8:], filled[:4]) == (bare[-8:], bare[:4])
    assert len({tuple(prompt.ids[50:80]) for prompt in prompts[4:]}) == 4
    assert len(prompts[2].ids) > 32


@pytest.mark.parametrize("backend", ["eager", "river", "torch_compile"])
def test_the_torch_rows_run_a_tiny_model(backend):
    """Rows of River are what a user types: at the depth of their options, with what a token costs outside."""
    from tests.support.families import make, prompt

    options = {"exit_depth": 0, "kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"}
    job = {
        "backend": backend,
        "options": {} if backend == "eager" else options,
        "new_tokens": 4,
        "batch": 1,
        "device": "cpu",
    }
    runner = torch_runner.TorchRunner(make("llama", layers=2), job | {"slots": [16], "new_tokens": 4, "batch": 1})
    first = prompt()[0].tolist()
    said = runner.prepare([first, first[:3]])
    assert 0 < said["first_token_s"] < said["second_token_s"]
    made = runner.generate(first, 4)
    assert (len(made["tokens"]), len(made["times"])) == (4, 4)
    found = runner.facts(first)
    assert found["mean_depth"] == (2.0 if backend == "eager" else 0.0)
    assert (found["outside_ms"] is None) == (backend == "eager")
    assert found["target_bits"] is None
    assert ("generate" in vars(runner.model)) == (backend == "river")


@pytest.mark.parametrize("drafts", [decode_rows.SMALL, decode_rows.BOTH])
def test_a_tiny_assistant_drafts_the_text_of_its_model(drafts):
    """Its twins are its own; the model's draft next to it where both do."""
    from tests.support.families import make, prompt

    options = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn", "num_assistant_tokens_schedule": "constant"}
    job = {"new_tokens": 8, "batch": 1, "device": "cpu", "slots": [16]}
    river = {"backend": "exact", "options": options, "drafts": drafts}
    ids = prompt()[0].tolist()
    runners = [
        torch_runner.TorchRunner(make("llama", layers=2), job | {"backend": "eager", "options": {}}),
        torch_runner.TorchRunner(make("llama", layers=2), job | river, make("llama", layers=2)),
    ]
    for runner in runners:
        runner.prepare([ids])
    plain, made = (runner.generate(ids, 8) for runner in runners)
    assert made["tokens"] == plain["tokens"]
    assert made["drafted"]["assistant"] > 0
    assert sum(made["emitted"].values()) == 7  # a prompt's first token is in no cycle
    assert ("river" in made["drafted"]) <= (drafts == decode_rows.BOTH)


def test_the_weights_that_full_depth_reads_come_from_the_report():
    from tests.support.families import make, prompt

    options = {"exit_depth": decode_rows.FULL_DEPTH, "kernels": OPERATORS, "target_weights": "model"}
    job = {"backend": "river", "options": options, "new_tokens": 4, "batch": 1, "device": "cpu", "slots": [16]}
    runner = torch_runner.TorchRunner(make("llama", layers=2), job)
    runner.prepare([prompt()[0].tolist()])
    assert runner.facts(prompt()[0].tolist())["target_bits"] == 16


def test_a_row_that_reads_more_than_was_measured_gives_the_bandwidth(tmp_path, monkeypatch):
    """100 tokens/s of a GB of 16-bit weights; the bytes that a row reads with drafts are not known."""
    from tests.support.families import make

    make("llama", layers=2).config.save_pretrained(tmp_path)
    monkeypatch.setattr(dry_run, "dry_run", lambda model: {"bytes": {"blocks": 8e8, "twins": 2e8, "head": 2e8}})
    read = 1e11
    rows = {"eager": {"decode_tokens_per_s": 100}, "exact": {"decode_tokens_per_s": 900, "target_bits": 16}}
    options = decode._parse([])
    monkeypatch.setattr(system, "bandwidth", lambda: read / 2)
    found = decode.memory_speed({"rows": rows}, tmp_path, options)
    assert found == {"bandwidth_bytes_per_s": read, "bandwidth_row": "eager"}
    monkeypatch.setattr(system, "bandwidth", lambda: read * 2)
    assert decode.memory_speed({"rows": rows}, tmp_path, options)["bandwidth_row"] is None


def test_a_smaller_model_is_one_that_can_be_had():
    assert {*demo_models.SMALLER, *demo_models.SMALLER.values()} <= {*demo_models.MODELS}
