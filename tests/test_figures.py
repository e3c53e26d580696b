"""Marked tables of README.md and docs/ are what ``python -m tools.figures`` writes from benchmarks/results."""

from __future__ import annotations

import json

import pytest

from river_compile.reporting import predict
from tools import figures, machines, records
from tools.marked import ROOT, filled, pages
from tools.records import RESULTS


@pytest.fixture
def results(tmp_path):
    """A function that adds a run to decode.jsonl; it returns the folder of results."""

    def add(model, day, commit="abc", isa="avx2", more=(), **speeds):
        machine = {
            "cpu": "A CPU",
            "threads": 2,
            "instruction_set": isa,
            "bandwidth_bytes_per_s": 4e10,
            "torch": "2.13",
        }
        run = {"model": model, "batch": 1, "new_tokens": 128, "repeats": 3, "machine": machine, "commit": commit}
        run |= {"date": f"2030-01-0{day}T10:00:00+00:00", "command": f"python -m benchmarks.decode --model {model}"}
        with (tmp_path / "decode.jsonl").open("a") as file:
            keys = ("first_token_s", "decode_tokens_per_s")
            numbers = [(row, key, value) for row, value in speeds.items() for key in keys]
            for row, key, value in [*numbers, *more]:
                file.write(json.dumps({**run, "row": row, "key": key, "value": value}) + "\n")
        return tmp_path

    return add


@pytest.mark.core
@pytest.mark.parametrize("page", pages("figures"), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_documents_have_the_recorded_numbers(page):
    """``python -m tools.figures`` changes nothing."""
    assert filled(page, "figures", figures.content) == page.read_text(encoding="utf-8")


def test_a_column_is_the_last_run_of_a_model(results):
    results("smollm2", 2, eager=44.04, exact=278.4)
    results("smollm2", 1, eager=1.0)
    folder = results("other", 2, eager=6.0, exact=99.97)
    lines = figures.content("decode smollm2 other", folder).splitlines()
    assert lines[0] == "| decode tokens/s | output comes from | SmolLM2-135M-Instruct | other |"
    assert "| transformers, eager | 16-bit weights | 44.0 | 6.0 |" in lines
    assert '| **River, default (`quality="exact"`)** | 16-bit weights | **278** | **100** |' in lines
    assert len(lines) == 2 + 2 + 2  # a program that was not measured has no row


def test_medians_over_prompts_have_their_range(results):
    """The fastest of several files is named, and the caption says kinds, weights and whose reads gave the bandwidth."""
    ends = {"least": 140.0, "most": 155.0}
    more = [("exact", f"decode_{end}_tokens_per_s", value) for end, value in ends.items()]
    more += [("llama_cpp_best4", "choice", "Q4_0"), ("exact", "target_bits", 12)]
    for context, kind, value in (
        ("32", "all", 148.0),
        ("32", "chat", 150.0),
        ("512", "all", 20.0),
        ("512", "chat", 1.0),
    ):
        more += [(f"exact/{context}/{kind}", "tokens_per_s", value)]
        more += [(f"exact/{context}/{kind}", f"{end}_tokens_per_s", end_value) for end, end_value in ends.items()]
    folder = results("smollm2", 1, more=more, exact=148.0, llama_cpp_best4=182.0)
    text = figures.content("decode smollm2", folder)
    assert "| 16-bit weights | **148** (140–155) |" in text
    assert "| llama.cpp, fastest of Q4_0, Q4_K_M, IQ4_NL | 4-bit weights | 182 Q4_0 |" in text
    assert "medians over prompts (chat) with their range." in text
    assert "12 of SmolLM2-135M-Instruct" in text
    head, _, row, *_ = figures.content("kinds smollm2", folder).splitlines()
    assert head.endswith("| all prompts, 32 tokens | chat, 32 tokens | all prompts, 512 tokens |")
    assert row.endswith("| 148 (140–155) | 150 (140–155) | 20.0 (140–155) |")


def test_kinds_need_a_run_that_has_them(results):
    folder = results("smollm2", 1, exact=1.0)
    with pytest.raises(ValueError, match="kinds smollm2: its last run has no kinds of prompts"):
        figures.content("kinds smollm2", folder)


def test_a_table_can_be_of_machines_of_an_instruction_set(results):
    results("smollm2", 2, isa="amx", eager=3.0)
    folder = results("smollm2", 1, eager=1.0)
    shown = {on: figures.content(f"decode smollm2{on}", folder).splitlines()[2] for on in ("", " on amx", " on avx2")}
    assert [line[-5:] for line in shown.values()] == ["3.0 |", "3.0 |", "1.0 |"]


def test_the_note_names_machine_date_commit_and_command(results):
    """Runs of one setting share a sentence; another setting has its own."""
    results("smollm2", 2, eager=1.0)
    folder = results("other", 2, eager=1.0)
    note = figures.content("decode smollm2 other", folder).splitlines()[-1]
    assert (
        "A CPU, 2 threads, avx2, 2030-01-02; torch 2.13: `python -m benchmarks.decode --model smollm2` (commit abc"
        in note
    )
    assert ", memory at 40 GB/s), `python -m benchmarks.decode --model other` (commit abc, memory at 40 GB/s)." in note
    assert "not measured" not in note
    folder = results("third", 2, exact=1.0)
    assert figures.content("decode other third", folder).splitlines()[-1].endswith("–: not measured.")
    folder = results("other", 3, commit="def", **dict.fromkeys(figures.PROGRAMS, 1.0))
    assert figures.content("decode smollm2 other", folder).count("A CPU, 2 threads") == 2
    assert "not measured" not in figures.content("decode other", folder)


def test_starts_are_rows_of_their_models(results):
    """What a row has no number of is a dash; a row without a time of readiness has its second token."""
    folder = results("smollm2", 1, eager=1.0)
    run = {**json.loads((folder / "decode.jsonl").read_text().splitlines()[0]), "command": "python -m benchmarks.start"}
    exact = {"first_token_s": 1.82, "second_token_s": 2.7, "ready_s": 13.0, "own_bytes": 8.04e8}
    exact |= {"pays_from_tokens": 261.9, "peak_rss_bytes": 5.9e9}
    rows = {"llama_cpp": {"first_token_s": 0.2, "second_token_s": 0.31}, "exact": exact}
    new = [{**run, "row": row, "key": key, "value": value} for row, of in rows.items() for key, value in of.items()]
    (folder / "start.jsonl").write_text("".join(json.dumps(record) + "\n" for record in new))
    assert figures.content("start smollm2", folder).splitlines()[2:4] == [
        "| SmolLM2-135M-Instruct | River, first start | 1.8 | 13.0 | 262 | 5.9 | 0.80 |",
        "| SmolLM2-135M-Instruct | llama.cpp, 4-bit file | 0.20 | 0.31 | – | – | – |",
    ]
    kept = {"exact": {"disk_bytes": 1.2e8}, figures.KERNELS: {"build_s": 17.2}}
    more = [{**run, "row": row, "key": key, "value": value} for row, of in kept.items() for key, value in of.items()]
    with (folder / "start.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in more))
    text = figures.content("start smollm2", folder)
    assert "| 262 | 5.9 | 0.80 | 0.12 |" in text
    assert "took 17 s more" in text
    assert "`python -m benchmarks.start` (commit abc, memory at 40 GB/s)." in figures.content("start smollm2", folder)


def test_a_changed_record_changes_the_page(results, tmp_path):
    folder, page = results("smollm2", 1, eager=1.0), tmp_path / "page.md"
    page.write_text("before\n<!-- figures: decode smollm2 -->\nold\n<!-- end of figures -->\nafter\n")

    def new():
        return filled(page, "figures", lambda arguments: figures.content(arguments, folder))

    page.write_text(new())
    text = page.read_text()
    assert new() == text
    assert (text.startswith("before\n<!-- figures: decode smollm2 -->\n\n| decode"), "old" in text) == (True, False)
    assert text.endswith("GB/s).\n\n<!-- end of figures -->\nafter\n")
    results("smollm2", 2, eager=2.0)
    assert new() != text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("decode smollm2", "has no record of smollm2; measure it with --record decode"),
        ("start smollm2 on amx", "has no record of smollm2 on amx; measure it with --record start"),
        ("speed", "no table 'speed'"),
    ],
)
def test_what_has_no_numbers_is_an_error(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        figures.content(arguments, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "no mark\n",
        "<!-- some: a -->\n",
        "<!-- end of some -->\n<!-- some: a -->\n",
        "<!-- some: a -->\n<!-- some: b -->\n<!-- end of some -->\n",
    ],
)
def test_a_mark_needs_its_end(text, tmp_path):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="needs a line <!-- end of some -->"):
        filled(tmp_path / "page.md", "some", str)


SIZES = {
    "parameters": 1_100_000_000, "blocks": 10, "blocks_bytes": 1_600_000_000, "twins_bytes": 450_000_000,
    "head_bytes": 400_000_000,
}  # fmt: skip


def test_predictions_are_bytes_by_bandwidth_times_a_measured_efficiency():
    sizes = predict.Sizes(1_100_000_000, 10, 1.6e9, 0.45e9, 0.4e9)
    reads = predict.bytes_per_token(sizes)
    assert reads["plain"] == 2e9
    assert reads["exact"] == pytest.approx((1.5e9 + 3 * 0.5625e9) / 3.3)
    assert reads["fast"] == pytest.approx(0.2 * 1.2e9 + 0.8 * 0.45e9 + 0.1125e9)
    assert reads["all_4bit"] == pytest.approx(0.5625e9)
    assert predict.memory_bytes(sizes) == pytest.approx(1.5e9 + 0.5625e9 + 0.2e9)
    assert predict.disk_bytes(sizes) == pytest.approx(1.5e9 + 0.5625e9)
    speeds = predict.tokens_per_s(sizes, 20e9)
    assert speeds == {name: pytest.approx(predict.EFFICIENCY[name] * 20e9 / count) for name, count in reads.items()}
    records = [{"row": "a", "key": key, "value": value} for key, value in SIZES.items()]
    (row,) = machines.table(records).splitlines()[2:]
    assert row.startswith(f"| a | 1.1B | 2.3 | {speeds['plain']:.1f} / {speeds['exact']:.0f} / {speeds['fast']:.0f} | ")


def test_efficiencies_are_means_over_all_recorded_machines():
    """Those that `river check` predicts with; a new record that moves one changes the constant."""
    reads = machines.sizes_of(figures.runs_of(RESULTS / "reads.jsonl", "shapes")[-1])
    found = machines.efficiencies(reads, records.read(RESULTS / "decode.jsonl"))
    assert {name: round(share, 2) for name, share in found.items()} == predict.EFFICIENCY
