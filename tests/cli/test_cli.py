"""Each command of `river` on a tiny model: what it prints, as people and the published schema want it; errors."""

import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import safetensors.torch
import torch
import torch._inductor.config as inductor
import transformers

import river_compile
from examples import demo
from river_compile import system
from river_compile.cli import app, commands, explain_error
from river_compile.cli.bench import PROMPTS
from river_compile.cli.painter import Painter
from river_compile.cli.shared import error_line
from river_compile.error_ids import TITLES
from river_compile.kernels.native.build import supported_isas
from river_compile.kernels.native.cores import Cores
from river_compile.reporting.predict import EFFICIENCY
from river_compile.runtime.state import on_step
from river_compile.runtime.stats import CycleRecord, cycles
from river_compile.twins import quantize
from tests.support.families import COMMON, CONFIGS, MORE_CONFIGS
from tools import cli_page
from tools.families.mxfp4 import write_gpt_oss

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/river.schema.json").read_text())
COMMANDS = ("check", "doctor", "bench", "chat", "quantize", "tune", "explain", "explain-error", "serve")


def river(capsys, *arguments, code=0):
    """Runs a command; returns what it printed."""
    found, printed = app.main([str(a) for a in arguments]), capsys.readouterr()
    assert found == code, printed.err
    return printed


def printed_json(capsys, *arguments, code=0):
    """Runs a command with --json; its standard output is one document that the schema describes."""
    found = json.loads(river(capsys, *arguments, "--json", code=code).out)
    jsonschema.validate(found, SCHEMA)
    assert found["command"] == arguments[0]
    return found


def finding_of(found, what):
    (finding,) = (finding for finding in found["findings"] if finding["what"] == what)
    return finding


def test_help_is_there_at_once(capsys):
    """It names every command and the exit codes, and imports neither torch nor transformers."""
    text = river(capsys, "--help").out
    assert all(f" {command} " in text for command in COMMANDS)
    assert "Exit codes: 0 done" in text
    code = "import sys; from river_compile.cli import app; app.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command, capsys):
    assert "--json" in river(capsys, command, "--help").out
    assert {"$ref": f"#/$defs/{command}"} in SCHEMA["oneOf"]


@pytest.mark.core
def test_the_page_of_commands_has_their_help():
    """``python -m tools.cli_page`` changes nothing."""
    page = cli_page.PAGE.read_text(encoding="utf-8")
    assert cli_page.replaced() == page
    assert all(f"\n## river {command}\n" in page for command in COMMANDS)


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "damaged"))


def failure(capsys, *arguments):
    """Runs a command that fails; returns its one line."""
    printed = river(capsys, *arguments, code=1)
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not line.startswith("[transformers]")]  # (of its server)
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


@pytest.mark.parametrize(
    "command",
    [("quantize", "-o", "never"), ("chat",), ("tune", "--kl", "1"), ("explain", "-o", "never"), ("serve",)],
)
def test_weights_that_were_cut_are_one_line_in_every_command(damaged, command, capsys):
    if command == ("serve",):
        pytest.importorskip("fastapi", reason="the server's packages are not installed")
    cut(damaged)
    assert f"{damaged} cannot be loaded: SafetensorError" in failure(capsys, command[0], damaged, *command[1:])


@pytest.mark.parametrize(
    ("command", "file", "content", "says"),
    [
        (("bench", "-m"), "model.safetensors", b"\xff" * 999, "SafetensorError: Error while deserializing header"),
        (("quantize", "-o", "never"), "model.safetensors", b"", "SafetensorError"),
        (("quantize", "-o", "never"), "tokenizer.json", b"{garbage", "JSONDecodeError"),
        (("check",), "config.json", b'{"model_type": "llama", "vocab_size": -5}', "RuntimeError"),
        (("check",), "config.json", b'{"model_type": "llama", "hidden_size": "abc"}', "expected int"),
    ],
)
def test_files_that_no_loader_reads_are_one_line(damaged, command, file, content, says, capsys):
    (damaged / file).write_bytes(content)
    said = failure(capsys, *command, damaged)
    assert said.startswith(f"error: {damaged} cannot be loaded: ")
    assert says in said


@pytest.mark.parametrize("command", [("check",), ("quantize", "-o", "never"), ("serve",)])
@pytest.mark.parametrize("config", [transformers.BertConfig(), transformers.BartConfig()])
def test_models_without_a_causal_head_are_refused(command, config, tmp_path, capsys):
    """An encoder, and an encoder-decoder; AutoModelForCausalLM would make a decoder of either."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}Model"]
    config.save_pretrained(tmp_path)
    said = failure(capsys, *command, tmp_path)
    assert f"holds a {config.architectures[0]}, which has no causal head" in said


def test_weights_that_a_checkpoint_lacks_are_named(damaged, capsys, caplog, monkeypatch):
    """By transformers' own warning, which is not silenced with the rest of what it says."""
    theirs = logging.getLogger("transformers")
    monkeypatch.setattr(theirs, "propagate", True)  # (to caplog)
    monkeypatch.setattr(theirs, "level", logging.ERROR)  # as the command's own process has it
    theirs.manager._clear_cache()
    logging.getLogger("transformers.modeling_utils").setLevel(logging.NOTSET)
    weights = safetensors.torch.load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    river(capsys, "bench", "-m", damaged, "-p", "0", "-n", "2", "-r", "1", "--row", "eager")
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text


def test_check_measures_bandwidth_between_what_else_runs(monkeypatch):
    """A machine that reads 26 GB/s, and whose scheduler takes the core away for 5 ms after every 5 ms."""
    clock = {"reading": 0.0, "now": 0.0}

    def read(tensor):
        turns = clock["reading"] // 0.005
        clock["reading"] += tensor.nbytes / 26e9
        clock["now"] += tensor.nbytes / 26e9 + 0.005 * (clock["reading"] // 0.005 - turns)

    with monkeypatch.context() as patch:
        patch.setattr(system.time, "perf_counter", lambda: clock["now"])
        patch.setattr(torch.Tensor, "sum", read)
        measured = system.bandwidth()
    assert measured == pytest.approx(26e9)


def test_the_version_is_there_at_once(capsys):
    assert river(capsys, "--version").out == f"river {river_compile.__version__}\n"


def test_wrong_usage_is_code_2(capsys):
    river(capsys, "check", code=2)
    river(capsys, "bench", code=2)
    river(capsys, "bench", "-m", "any", "--unknown", code=2)
    assert error_line(ValueError("two\n  lines")) == "two lines"
    assert error_line(ValueError()) == "ValueError"


@pytest.mark.slow
def test_check_counts_what_a_token_reads(tiny, capsys):
    """The parts' bytes are those of the model's parameters; predictions are the bandwidth by these bytes."""
    found = printed_json(capsys, "check", tiny, "--bandwidth", "10")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    assert found["graphs"] == {"prefill": 3, "decode": 3}
    assert found["parameters"] == model.num_parameters()
    assert found["bytes"]["blocks"] == 2 * blocks
    assert found["bytes"]["head"] == 2 * head
    assert found["bytes"]["twins"] < 0.4 * found["bytes"]["blocks"]
    assert found["twin_matmuls"] == 3 * 4
    reads, speeds = found["bytes_per_token"], found["predicted_tokens_per_s"]
    assert reads["plain"] == 2 * (blocks + head)
    # Of these three layers, fast mode reads two in 12 bits.
    assert reads["plain"] > reads["fast"] > reads["exact"] > reads["all_4bit"]
    for name, efficiency in EFFICIENCY.items():
        assert speeds[name] == pytest.approx(efficiency * 10e9 / reads[name])
    assert found["memory_bytes"] > found["disk_bytes"] > 0.75 * reads["plain"]
    page = river(capsys, "check", tiny, "--bandwidth", "10").out
    for text in ("supported, 3 layers", "an estimate", "River, default (exact)", "transformers", "compile cache"):
        assert text in page


@pytest.mark.usefixtures("fresh_dynamo")
def test_check_says_that_a_model_runs_at_transformers_speed_by_default(tmp_path, capsys):
    """A recurrence cannot be rewound."""
    transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128).save_pretrained(tmp_path)
    found = printed_json(capsys, "check", tmp_path, "--bandwidth", "10", code=3)
    assert "the recurrent state of Mamba" in found["exact_refusal"]
    assert found["drafts_refusal"] is None
    page = " ".join(river(capsys, "check", tmp_path, "--bandwidth", "10", code=3).out.split())
    assert "exact runs at transformers' speed: " in page
    assert "River, default" not in page
    assert "River, fast with threshold=0.7" in page


@pytest.mark.usefixtures("fresh_dynamo")
def test_check_says_that_a_model_runs_without_drafts_by_default(tmp_path, capsys):
    """Convolutions keep no entries to remove; each token reads the packed weights."""
    kinds = ["conv", "full_attention"]
    transformers.Lfm2Config(**COMMON, num_hidden_layers=2, layer_types=kinds).save_pretrained(tmp_path)
    found = printed_json(capsys, "check", tmp_path, "--bandwidth", "10")
    assert "cache layers of kind LinearAttentionLayer" in found["drafts_refusal"]
    assert found["exact_refusal"] is None
    assert found["bytes_per_token"]["exact"] == 0.75 * found["bytes_per_token"]["plain"]
    page = " ".join(river(capsys, "check", tmp_path, "--bandwidth", "10").out.split())
    assert "exact runs without drafts, on River's kernels: " in page
    assert "River, default" in page


@pytest.mark.usefixtures("fresh_dynamo")
def test_check_knows_experts_in_mxfp4(tmp_path, capsys):
    """They are counted as the checkpoint has them, once; in another dtype they are dequantized, which the page says."""
    config = MORE_CONFIGS["gpt_oss"](2)
    experts = write_gpt_oss(tmp_path, config)
    found = printed_json(capsys, "check", tmp_path, "--bandwidth", "10")
    assert found["graphs"] == {"prefill": 2, "decode": 2}
    assert found["experts"] == {"layout": "mxfp4", "chosen": experts // 2, "all": experts}  # two of four
    in_16_bits = 2 * found["parameters"]
    assert experts < found["memory_bytes"] < in_16_bits - 2 * experts
    assert found["inactive"]["blocks"] == found["resident_originals_bytes"] == 0  # none is copied
    assert found["disk_bytes"] < in_16_bits - experts * 64 // 17  # without experts
    reads = found["bytes_per_token"]
    assert reads["exact"] < reads["plain"] - 2 * found["experts"]["chosen"]
    page = " ".join(river(capsys, "check", tmp_path, "--bandwidth", "10").out.split())
    assert "experts MXFP4, as in the checkpoint: 0.1 MB, of which a token reads 0.1 MB exact runs; twins share" in page
    assert "memory 0." in page
    found = printed_json(capsys, "check", tmp_path, "--bandwidth", "10", "--dtype", "float32")
    assert "require dtype=torch.bfloat16" in found["experts"]
    assert found["memory_bytes"] > in_16_bits
    page = " ".join(river(capsys, "check", tmp_path, "--bandwidth", "10", "--dtype", "float32").out.split())
    assert "experts dequantized: MXFP4 experts require dtype=torch.bfloat16" in page


@pytest.mark.usefixtures("fresh_dynamo")
def test_check_counts_the_copies_of_all_experts_and_the_stacks_that_loading_merges(tmp_path, capsys):
    """All experts are packed, though a token chooses two of four; Qwen3-MoE's checkpoints have a matrix for each."""
    config = CONFIGS["qwen3_moe"](2)
    config.save_pretrained(tmp_path)
    found = printed_json(capsys, "check", tmp_path, "--bandwidth", "10")
    experts = 2 * 2 * 4 * 3 * 64 * 64  # bytes: two layers of four experts, each of three square matrices
    others = 2 * found["parameters"] - experts
    assert found["inactive"]["blocks"] == experts // 2
    assert found["resident_originals_bytes"] == experts
    copies = (12 + 4.5) / 16
    assert copies * experts < found["disk_bytes"] < copies * (experts + others)
    assert found["memory_bytes"] == pytest.approx(found["disk_bytes"] + experts + 2 * 128 * 64)  # and the embedding
    page = " ".join(river(capsys, "check", tmp_path, "--bandwidth", "10").out.split())
    assert "(of these, 0.2 MB of experts in 16 bits, which no file backs)" in page


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")  # (what broke a frame here runs without a backend in other models too)
def test_check_of_a_model_that_is_refused_is_code_3(tmp_path, capsys):
    """MPT's code reads tensors, which breaks its graph and has nothing to read here."""
    transformers.MptConfig(vocab_size=128, d_model=64, n_heads=4, n_layers=2, max_seq_len=64).save_pretrained(tmp_path)
    found = printed_json(capsys, "check", tmp_path, "--bandwidth", "10", code=3)
    assert "decoder layers" in found["refusal"] or "does not run without weights" in found["refusal"]
    assert found["bytes"] is None
    assert "unsupported" in river(capsys, "check", tmp_path, "--bandwidth", "10", code=3).out


def test_doctor_tells_versions_compiler_and_caches_and_tries_a_tiny_model(capsys, monkeypatch):
    found = printed_json(capsys, "doctor")
    states = {finding["what"]: finding["state"] for finding in found["findings"]}
    assert {"Python", "torch", "transformers", "compiler", "processor", "threads", "GPU", "cache"} <= set(states)
    assert states["self-test"] == "ok"
    assert found["healthy"]


@pytest.mark.parametrize(("gpu", "state"), [(False, "ok"), (True, "warning")])
def test_doctor_misses_triton_on_a_gpu_only(gpu, state, capsys, monkeypatch):
    def found(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.12"

    monkeypatch.setattr("river_compile.upstream.versions.installed", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    finding = next(f for f in commands.versions() if f.what == "triton")
    assert (finding.state, finding.text.partition(",")[0]) == (state, "not installed")


def test_doctor_says_that_the_cache_has_no_place(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for home, free, state in ((file, 10**10, "bad"), (tmp_path, 10**6, "warning"), (tmp_path / "new", 10**10, "ok")):
        monkeypatch.setenv("RIVER_COMPILE_HOME", str(home))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        found = printed_json(capsys, "doctor", "--no-self-test", code=3 if state == "bad" else 0)
        assert finding_of(found, "cache")["state"] == state


def test_doctor_names_the_instruction_set_and_those_that_can_be_forced(capsys, monkeypatch):
    names = [isa.name for isa in supported_isas()]
    for name in (names[0], names[-1]):
        monkeypatch.setenv("RIVER_COMPILE_ISA", name)
        said = finding_of(printed_json(capsys, "doctor", "--no-self-test"), "processor")
        assert f"kernels for {name} (RIVER_COMPILE_ISA: {', '.join(names)})" in said["text"]
        assert said["state"] == ("warning" if name == "portable" else "ok")


def test_doctor_says_which_cores_are_left_out(capsys, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("river_compile.kernels.native.cores.cores", lambda: Cores(8, 3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    said = finding_of(printed_json(capsys, "doctor", "--no-self-test"), "threads")
    assert said["text"].startswith("3 on the fast cores of 8, ")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert finding_of(printed_json(capsys, "doctor", "--no-self-test"), "threads")["text"] == "8"


def test_doctor_tries_the_compiler(capsys):
    """One that is there and compiles nothing is bad, as one that is not."""
    for compiler in ("no-such-compiler", shutil.which("false")):
        with inductor.patch({"cpp.cxx": (None, compiler)}):
            found = printed_json(capsys, "doctor", "--no-self-test", code=3)
        said = finding_of(found, "compiler")
        assert said["state"] == "bad"
        assert compiler in said["text"]
        assert "Install g++" in said["text"]


def test_a_self_test_without_a_compiler_says_what_to_install(capsys, monkeypatch):
    """In the words of the backend's warning, without Dynamo's around them."""
    monkeypatch.undo()  # (the backend's own defaults need a compiler)
    with inductor.patch({"cpp.cxx": (None, shutil.which("false"))}):
        found = printed_json(capsys, "doctor", code=3)
    said = finding_of(found, "self-test")
    assert said["state"] == "bad"
    assert said["text"].startswith("RC100: Could not compile River's C++ kernels, so the model runs uncompiled")
    assert "Install g++" in said["text"]


def test_doctor_says_that_a_self_test_fails(capsys, monkeypatch):
    """Here the tiny model never drafts."""
    monkeypatch.setattr("river_compile.api.accelerate.accelerate", lambda model, **options: model)
    assert "is not its plain text" in river(capsys, "doctor", code=3).out


def test_bench_has_a_row_of_each_test_for_each_backend_and_packs_twins_once(tiny, capsys, monkeypatch):
    made = []
    quantized = quantize._grid
    monkeypatch.setattr(quantize, "_grid", lambda *given: (made.append(given), quantized(*given))[1])
    found = printed_json(capsys, "bench", "-m", tiny, "-p", "8", "-n", "4", "-r", "2")
    tests = [(row["backend"], row["test"]) for row in found["results"]]
    rows = ("eager", "no-draft", "exact", "fast", "all-4bit")
    assert tests == [(row, test) for row in rows for test in ("pp8", "tg4")]
    for row in found["results"]:
        prompts = len(PROMPTS) if row["test"] == "tg4" else 1
        assert len(row["samples_ts"]) == 2 * prompts
        assert statistics.fmean(row.get("prompts_ts", {"": row["avg_ts"]}).values()) == pytest.approx(row["avg_ts"])
    assert len(made) == 3 * 4  # blocks, and a block's products


@pytest.mark.parametrize("form", ["md", "csv", "jsonl"])
def test_bench_prints_other_forms(tiny, form, capsys):
    lines = river(
        capsys, "bench", "-m", tiny, "-p", "0", "-n", "2", "-r", "1", "--row", "eager", "-o", form
    ).out.splitlines()
    assert len(lines) == {"md": 3, "csv": 2, "jsonl": 1}[form]
    if form == "md":  # (llama-bench's columns)
        heads, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[::2])
        assert heads == ["model", "size", "params", "backend", "threads", "test", "t/s"]
        assert (row[heads.index("backend")], row[heads.index("test")]) == ("eager", "tg2")
        mean, deviation = row[heads.index("t/s")].split(" ± ")
        assert float(mean) > 0 <= float(deviation)
    if form == "jsonl":
        jsonschema.validate(
            json.loads(lines[0]), {"$ref": "#/$defs/bench/properties/results/items", "$defs": SCHEMA["$defs"]}
        )


def test_tune_has_the_defaults_of_tune_exit():
    """The page says that both do the same."""
    of_function = inspect.signature(river_compile.tune_exit).parameters
    of_command = inspect.signature(commands.tune).parameters
    shared = [name for name in of_command if name in of_function and name not in ("model", "texts")]
    assert {"tokens", "context", "criterion", "kl", "agreement"} == set(shared)
    assert [of_command[name].default for name in shared] == [of_function[name].default for name in shared]


def test_explain_error_prints_the_section_of_every_id_without_links(capsys):
    """Its title is the registry's, and its text names no page that an installed package lacks."""
    said = explain_error.sections()
    assert {id: title for id, (title, _) in said.items()} == TITLES
    assert not [id for id, (_, text) in said.items() if not text.endswith(".") or re.search(r"\]\(|<a |^#|\.md", text)]
    page = river(capsys, "explain-error", "rc065").out
    assert page.startswith("RC065: Static KV cache is full\n\nThe text outgrew the cache")
    assert printed_json(capsys, "explain-error", "RC065")["text"] == said["RC065"][1]
    assert "RC999 is no id of an error or a warning. Ids are RC001," in failure(capsys, "explain-error", "RC999")


def test_quantize_and_chat_with_the_twins(tiny, tmp_path, capsys):
    """The answer is the plain model's, and every token has a source."""
    made = printed_json(capsys, "quantize", tiny, "-o", tmp_path / "twins", "--dtype", "float32")
    assert made["bytes"] == sum(file.stat().st_size for file in (tmp_path / "twins").iterdir())
    options = ("--twins", tmp_path / "twins", "--dtype", "float32", "-n", "12")
    turn = printed_json(capsys, "chat", tiny, *options, "--prompt", "hello")["turns"][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("user: hello\nassistant: ", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert turn["assistant"] == tokenizer.decode(plain, skip_special_tokens=True).rstrip("\ufffd")
    assert turn["tokens"][0]["source"] == "prompt"
    assert {t["source"] for t in turn["tokens"]} <= {"prompt", "river", "lookup", "backbone"}
    assert len(turn["tokens"]) == 12


@pytest.mark.slow
def test_an_assistant_drafts_for_chat_and_bench_and_check_predicts_it(tiny, capsys):
    """Here the model itself, in 4 bits."""
    drafts = ("--assistant", tiny)
    options = ("--dtype", "float32", "-n", "12", "--prompt", "hello")
    plain = printed_json(capsys, "chat", tiny, *options)["turns"][0]
    turn = printed_json(capsys, "chat", tiny, *drafts, *options)["turns"][0]
    assert turn["assistant"] == plain["assistant"]
    assert {t["source"] for t in turn["tokens"]} <= {"prompt", "assistant", "lookup", "backbone"}
    found = printed_json(capsys, "bench", "-m", tiny, *drafts, "--row", "assistant", "-p", "0", "-n", "4", "-r", "1")
    assert [(row["backend"], row["test"]) for row in found["results"]] == [("assistant", "tg4")]
    assert "needs --assistant MODEL" in failure(capsys, "bench", "-m", tiny, "--row", "assistant")
    found = printed_json(capsys, "check", tiny, *drafts, "--bandwidth", "10")
    reads = found["bytes_per_token"]
    assert reads["all_4bit"] < reads["assistant"] < reads["plain"]
    assert found["predicted_tokens_per_s"]["assistant"] == pytest.approx(
        EFFICIENCY["exact"] * 10e9 / reads["assistant"]
    )
    assert "River, exact with the assistant" in river(capsys, "check", tiny, *drafts, "--bandwidth", "10").out


def test_chat_shows_depths_where_tokens_leave(tiny, capsys):
    turn = printed_json(capsys, "chat", tiny, "--quality", "fast", "-n", "6", "--prompt", "hello")["turns"][0]
    assert {t["source"] for t in turn["tokens"][1:]} <= {"depth 0", "depth 3"}


def test_chat_takes_commands_between_questions(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/stats\n/help\n/reset\n/report\n/exit\nnever asked\n"))
    out = river(capsys, "chat", tiny, "--quality", "fast", "-n", "6").out
    assert re.search(r"6 tokens, [\d.]+ tokens/s, compiling included: ", out)
    assert "/stats" in out
    assert "River Compile report for LlamaForCausalLM" in out


class Typed(io.StringIO):
    """What a person types."""

    def isatty(self):
        return True


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_ctrl_c_ends_an_answer_and_at_a_terminal_not_the_conversation(quality, tiny, capsys, monkeypatch):
    """The answer stands as far as it came, and the next one is as long as it was to be."""

    def interrupt(*step):
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    for stdin, code, answers in ((Typed, 0, 2), (io.StringIO, 130, 0)):
        steps = itertools.count()
        monkeypatch.setattr("sys.stdin", stdin("hello\n/stats\nagain\n/stats\n"))
        with on_step(interrupt):
            out = river(capsys, "chat", tiny, "--quality", quality, "-n", "12", code=code).out
        lengths = [int(tokens) for tokens in re.findall(r"(\d+) tokens[,:]", out)]
        assert len(lengths) == answers
        assert lengths == [] or (1 <= lengths[0] < 12 and lengths[1] == 12)


@pytest.mark.slow
def test_tune_writes_what_calibration_takes(tiny, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"{i} is a number, and {i + 1} comes after it." for i in range(40)))
    file = tmp_path / "c.json"
    found = printed_json(
        capsys, "tune", tiny, "--kl", "5", "--texts", texts, "--tokens", "2", "--context", "4", "-o", file
    )
    assert found["budget"] == {"kl": 5.0}
    turn = printed_json(capsys, "chat", tiny, "--calibration", file, "-n", "4", "--prompt", "hello")
    assert turn["turns"][0]["tokens"]
    river(capsys, "tune", tiny, "--kl", "5", "--texts", tmp_path / "none.txt", code=1)


def test_a_painter_gives_each_token_its_source():
    """A cycle's tokens wait for it; half a character shows with the token that ends it."""
    pieces = {(1,): "a", (1, 2): "a\ufffd", (1, 2, 3): "aé", (1, 2, 3, 4): "aéb"}
    shown = []
    painter = Painter(lambda ids: pieces[tuple(ids)], lambda *piece: shown.append(piece), by_cycle=True, blocks=4)
    with painter.watching():
        for ids in ([9, 9], [1], [2], [3]):
            painter.put(torch.tensor(ids))
        assert shown == [("a", "default")]
        cycles(CycleRecord(("river",), ("river", "backbone"), 2, (0.0, 0.0, 0.0), thread=0, model=0))
        painter.put(torch.tensor([4]))
        painter.end()
    assert painter.tokens == [("a", "prompt"), ("", "river"), ("é", "backbone"), ("b", "backbone")]
    assert painter.text == "aéb"
    assert painter.sources == {"prompt": 1, "river": 1, "backbone": 2}


@pytest.mark.slow
def test_the_demo_runs_to_its_pictures(tiny, tmp_path, capsys):
    """Three ways, what is so of their texts, a picture with the depth of every token, and the recording."""
    picture, recording = tmp_path / "new" / "depths.png", tmp_path / "newer" / "demo.svg"
    files = ("--picture", str(picture), "--record", str(recording))
    assert demo.main(["--model", tiny, "--new-tokens", "6", *files]) == 0
    out = capsys.readouterr().out
    assert "exact equals River without drafts token for token, 6 of 6." in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(recording).getroot().tag.endswith("svg")
