"""Decode speed on a GPU, without one: what is asked of the processes, what a run that breaks keeps, what is compared.

Apart from the device it is the code of a GPU run: a tiny Llama is measured on the CPU.
"""

import json
import math
import types

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import common, cuda_decode, cuda_worker, decode, gpu_facts
from benchmarks.cuda_worker import Bench, NotGraphed, counted, covered
from benchmarks.estimate import exact_cycle
from benchmarks.int4_baseline import Int4Linear, fits, packed_for_cuda, scales_and_zeros, use_int4
from benchmarks.random_llama import random_llama
from river_compile.decoding.mode import exact
from river_compile.kernels.quant.grid import quantize
from river_compile.runtime.stats import CycleRecord
from tests.kernels.harness import dots_in_order
from tests.support.lowerings import FUSED, OPERATORS
from tools.kernels.shapes import MODELS, ModelShape
from tools.recorder import recording

SIZES = {"context": 8, "group_size": 32, "new_tokens": 5}
PARTS = {"draft": 2, "verify": 1, "rest": 1}  # of a cycle with two drafted tokens
CYCLES = [CycleRecord(("river",) * 2, ("river", "backbone"), 3, (0.2, 0.3, 0.1), 0, 0)]


@pytest.fixture
def tiny(monkeypatch):
    """A shape that `--random` can build here."""
    monkeypatch.setitem(MODELS, "llama-tiny", ModelShape("llama-tiny", 4, 64, 4, 2, 16, 128, 96))
    return "llama-tiny"


@pytest.fixture
def no_grad():
    """A worker switches gradients off permanently."""
    with torch.no_grad():
        yield


def answered(job, speed=80.0):
    """A row as a worker answers it."""
    row = {"backend": "river", "depth": None, "asked": False, **job}
    del row["generates"]
    speeds = {"tokens_per_s": speed, "generate_tokens_per_s": 50.0, "kept_tokens_per_s": None}
    counts = {"kernels": 9, "graphs": 2, "waits": 0, "captures": 3, "capture_s": 0.5, "capture_bytes": 10**6}
    seconds = {"seconds": [0.9 / speed, 1 / speed, 1.1 / speed], "busy": 0.5}
    return (
        row
        | speeds
        | counts
        | seconds
        | {"bytes": 10**9, "peak_bytes": 10**9, "argmax": 1.0, "cosine": 0.5, "nan": False}
    )


def exact_answer(holds, drafted=3, parts_at=None):
    """A row of exact mode as a worker answers it: cycles of 10 ms, where 8 are modelled."""
    at = {"tokens_per_cycle": 2.0, "tokens_per_s": 200.0, "over_plain": 1.25}
    at |= {"modelled_tokens_per_s": 250.0, "modelled_over_plain": 1.5}
    return {
        **{"backend": "exact", "drafted": drafted, "width": 4, "parts_at": parts_at, "cycles": 5},
        "holds": [{"hold": hold, **at} for hold in holds],
        **{"tokens_per_s": 150.0, "tokens_per_cycle": 1.5, "held": 0.25, "busy": 0.75, "waits": 1},
        "cycle": {"seconds": 0.01, "draft": 0.002, "verify": 0.003, "rest": 0.001, "plain": 0.00625},
        "modelled": {"seconds": 0.008, "draft": 0.0015, "verify": 0.0034, "rest": 0.0001, "plain": 0.006},
    }


class FakeWorker:
    """Stands in for a process: notes what it is asked, and answers."""

    log: list
    answers: dict

    def __init__(self, module, name, threads):
        assert module == "benchmarks.cuda_worker"
        self.backend = name.partition(" ")[2]

    def ask(self, command, **job):
        self.log.append((self.backend, command, job.get("depth"), job.get("asked", False)))
        if command == "prepare":
            return {"seconds": 1.0}
        if command == "exact":
            return exact_answer(**job, parts_at=self.answers.get("parts_at"))
        answer = self.answers.get((self.backend, job["depth"], job.get("asked", False)), 80.0)
        if isinstance(answer, BaseException):
            raise answer
        return answered({"generates": True, **job, "backend": self.backend}, answer)

    def close(self):
        pass


@pytest.fixture
def workers(monkeypatch):
    log: list = []
    worker = type("Worker", (FakeWorker,), {"log": log, "answers": {}})
    monkeypatch.setattr(common, "Worker", worker)
    return worker


@pytest.fixture
def card(monkeypatch):
    """A card without measurements: its name, its facts and its clocks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_facts, "facts", lambda: {"driver": "1"})
    monkeypatch.setattr(gpu_facts, "clocks", lambda: {"sm_mhz": "1980"})
    monkeypatch.setattr("benchmarks.kernels.copy_bandwidth", lambda: 1e12)


def options(tiny, *more):
    return decode._parse(["--device", "cuda", "--random", tiny, *more])


def test_a_process_for_each_backend_and_rivers_first(workers, card, tiny, capsys):
    workers.answers = {("inductor", None, False): 100.0, ("river", 3, False): 250.0}
    assert cuda_decode.main(options(tiny, "--depths", "never", "0", "3")) == 0
    assert [entry for entry in workers.log if entry[1] == "prepare"] == [
        (backend, "prepare", None, False)
        for backend in ("river", "inductor", "exact", "int4", "inductor tuned", "eager")
    ]
    river = [entry[2:] for entry in workers.log if entry[:2] == ("river", "row")]
    assert river == [(None, False), (0, False), (3, False), (None, True), (3, True)]
    printed = capsys.readouterr().out
    assert "One exit check costs 0.00 us (+- " in printed
    assert "llama-tiny river never: 80.0 tokens/s" in printed  # as soon as it is there
    assert "Depth 3 over Inductor's 16-bit model: 2.50 (2.16 to reach)." in printed
    assert "25%" in printed  # 250 tokens/s of 1 GB, where copies reach 1000 GB/s
    line = next(line for line in printed.splitlines() if line.startswith("river depth 3"))
    assert line.split()[3:6] == ["250.00", f"{(250 / 0.9 - 250 / 1.1) / 2:.2f}", "3350"]


def test_rows_are_written_one_by_one(workers, card, tiny, tmp_path):
    """A run that is killed keeps what it has."""
    file = tmp_path / "gpu.json"
    workers.answers = {("river", 1, False): KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        cuda_decode.main(options(tiny, "--depths", "never", "0", "1", "--json", str(file)))
    kept = json.loads(file.read_text())
    assert [row["name"] for row in kept["models"][tiny]["rows"]] == ["river never", "river depth 0"]
    assert kept["clocks"] == [{"sm_mhz": "1980"}] * 3  # before, and after each row
    assert kept["facts"] == {"driver": "1"}


def test_a_row_that_fails_is_noted_and_the_next_begins(workers, card, tiny, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    workers.answers = {("inductor", None, False): common.WorkerFailed("NotGraphed: left out CUDA graphs 7 times")}
    only = ("--only", "inductor", "eager", "--json", str(file))
    assert cuda_decode.main(options(tiny, *only)) == 0
    found = json.loads(file.read_text())["models"][tiny]
    assert [row["name"] for row in found["rows"]] == ["eager"]
    assert found["missing"] == {"inductor": "NotGraphed: left out CUDA graphs 7 times"}
    assert "inductor: NotGraphed" in capsys.readouterr().out


@pytest.mark.parametrize("parts_at", [None, 17])
def test_exact_mode_stands_beside_its_estimate(parts_at, workers, card, tiny, tmp_path, capsys):
    """Measured first, modelled below; a text that parts is a failure whose times are kept."""
    file = tmp_path / "gpu.json"
    workers.answers = {"parts_at": parts_at}
    only = ("--only", "exact", "--hold", "0.5", "--no-generate", "--json", str(file))
    assert cuda_decode.main(options(tiny, *only)) == 0
    assert [entry[:2] for entry in workers.log] == [("exact", command) for command in ("prepare", "exact")]
    found = json.loads(file.read_text())["models"][tiny]
    assert [row["name"] for row in found["rows"]] == ["exact"]
    reason = "not the text without drafts from token 17 on"
    assert found["missing"] == ({} if parts_at is None else {"exact": reason})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["measured", "2000", "3000", "1000", "10000", "6250", "150.00", "1.50", "25%", "75%", "1"] in printed
    assert ["modelled", "1500", "3400", "100", "8000", "6000", *"-----"] in printed
    assert ["0.50", "2.00", "200.00", "1.25", "250.00", "1.50"] in printed


def test_a_whole_draft_must_fit(card, tiny):
    with pytest.raises(ValueError, match="--drafted 6 needs --new-tokens 9 or more"):
        cuda_decode.check(options(tiny, "--depths", "never", "--drafted", "6", "--new-tokens", "8"))


def test_no_row_begins_that_would_end_too_late(workers, card, tiny, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 50))  # every look takes 50 s
    monkeypatch.setattr("benchmarks.cuda_decode.time.monotonic", lambda: next(clock))
    assert cuda_decode.main(options(tiny, "--only", "river", "--depths", "never", "0", "1", "2", "--minutes", "4")) == 0
    printed = capsys.readouterr().out
    assert "river never: 80.0" in printed
    assert "river depth 2: no time for it: 50 s or more" in printed


def test_without_generate_only_the_loop_is_timed(tiny):
    rows = [row for row in cuda_decode.rows_of(options(tiny, "--no-generate")) if row.command == "row"]
    assert not any(row.job["generates"] for row in rows)


def test_the_cost_of_a_check_has_an_error(tiny):
    rounds = [(False, [1.0, 2.0, 3.0]), (True, [8.0]), (True, [4.0, 5.0, 6.0])]
    never, once, thrice = (
        {"backend": "river", "depth": None, "asked": asked, "seconds": seconds} for asked, seconds in rounds
    )
    assert cuda_decode.check_cost([never], tiny) is None
    assert cuda_decode.check_cost([once], tiny) is None
    for asked, seconds, error in ((once, 2.0, math.sqrt(1 / 3) / 3), (thrice, 1.0, math.sqrt(2 / 3) / 3)):
        expected = {"seconds": seconds, "error": pytest.approx(error), "count": 3}
        assert cuda_decode.check_cost([never, asked], tiny) == expected


def eagerly(monkeypatch):
    """Compiles River without Inductor, which would take longer than all the rest."""
    compile_model = torch.nn.Module.compile

    def compiled(model, **settings):
        settings["options"] |= {"kernels": OPERATORS, "graphs": True}
        return compile_model(model, **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)


@pytest.mark.core
@pytest.mark.slow
@recording()
def test_rivers_rows(tiny, monkeypatch, no_grad):
    """Forced and asked depths; those of the backbone choose as plain transformers do; caches are taken back."""
    eagerly(monkeypatch)
    bench = Bench()
    bench.prepare(tiny, "river", **SIZES, device="cpu")
    never, left = bench.row(None), bench.row(1, generates=False)
    assert never["argmax"] == 1.0
    assert never["cosine"] > 0.9999
    assert left["cosine"] < 0.9999
    assert left["bytes"] < never["bytes"]
    assert never["generate_tokens_per_s"] > 0
    assert never["kept_tokens_per_s"] > 0
    assert left["generate_tokens_per_s"] is None
    asked = bench.row(1, asked=True, generates=False)
    assert asked["cosine"] == left["cosine"]
    assert bench.row(None, asked=True, generates=False)["cosine"] == never["cosine"]
    assert all(row["tokens_per_s"] > 0 and len(row["seconds"]) == 3 for row in (never, left, asked))
    assert never["captures"] > 0
    assert bench.row(None, generates=False)["captures"] == 0
    assert int(bench.loop.cache.get_seq_length()) == SIZES["context"]


@pytest.mark.slow
@recording()
@dots_in_order()
def test_exact_mode_s_rows(tiny, monkeypatch, no_grad):
    """Generated kernels in Triton's interpreter: verified text is that without drafts."""
    monkeypatch.setitem(MODELS, tiny, ModelShape(tiny, 2, 64, 4, 2, 16, 128, 96))
    compile_model = torch.nn.Module.compile

    def compiled(model, options, backend):
        compile_model(model, backend=backend, options={**options, "kernels": FUSED, "graphs": True})

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(cuda_worker, "_REPEATS", 1)
    bench = Bench()
    bench.prepare(tiny, "exact", **SIZES, device="cpu")
    row = bench.exact_row(drafted=2, holds=[0.5, 1.0])
    assert (row["parts_at"], row["drafted"], row["width"]) == (None, 2, 3)
    assert row["cycle"]["seconds"] == pytest.approx(sum(f * row["cycle"][k] for k, f in PARTS.items()), rel=0.3)
    assert [of["tokens_per_cycle"] for of in row["holds"]] == [1.75, 3.0]
    assert [of["tokens_per_s"] * row["cycle"]["seconds"] for of in row["holds"]] == pytest.approx([1.75, 3.0])
    assert all(of["over_plain"] == of["tokens_per_s"] * row["cycle"]["plain"] > 0 for of in row["holds"])
    paper = exact_cycle(bench._roofline, 0.5, "dense", "dense", 2)
    parts = {key: paper[f"{key}_seconds"] for key in ("draft", "verify")} | {"seconds": paper["seconds"]}
    assert row["modelled"].items() >= parts.items()
    assert row["modelled"]["seconds"] == pytest.approx(sum(f * row["modelled"][k] for k, f in PARTS.items()))
    without = exact_cycle(bench._roofline, 0.5, "dense", "dense", 0)
    assert row["modelled"]["plain"] == pytest.approx(without["seconds"])
    assert row["tokens_per_cycle"] == (SIZES["new_tokens"] - 1) / row["cycles"]
    assert int(bench.loop.cache.get_seq_length()) == SIZES["context"]
    # Rounding other than the backbone's is noticed, and says where.
    monkeypatch.setattr(bench.loop, "text", lambda custom_generate, **how: [1, 2, 3 + (custom_generate is exact)])
    monkeypatch.setattr(bench.loop, "text_in_steps", lambda **how: (bench.loop.text(**how), 1.0))
    monkeypatch.setattr(bench.loop, "text_in_cycles", lambda **how: (bench.loop.text(**how), CYCLES, 1.0))
    assert bench.exact_row(drafted=2, holds=[0.5])["parts_at"] == 2


@pytest.mark.core
@pytest.mark.parametrize("backend", ["inductor", "int4"])
def test_baselines_find_a_cache_that_stays(backend, tiny, monkeypatch, no_grad):
    """Inductor replays CUDA graphs over a cache that is marked as static memory, which no compiled prompt does."""
    called: list[int] = []
    monkeypatch.setitem(MODELS, tiny, ModelShape(tiny, 2, 128, 4, 2, 32, 256, 96))

    def compiled(model, **settings):
        assert settings == {"options": cuda_worker.INDUCTOR[backend]}
        assert settings["options"]["triton.cudagraphs"]
        forward = model.forward
        monkeypatch.setattr(
            model, "_compiled_call_impl", lambda **k: (called.append(k["input_ids"].shape[1]), forward(**k))[1]
        )

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    bench = Bench()
    bench.prepare(tiny, backend, **SIZES, device="cpu")
    row = bench.row(None, generates=False)
    assert set(called) == {1}
    for layer in bench.loop.cache.layers:
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            assert tensor._dynamo_static_input_type is not None
    assert (row["cosine"] > 0.9999) == (backend == "inductor")
    assert row["cosine"] > 0.9


def test_a_compiled_prompt_would_leave_the_cache_unmarked(tiny, no_grad):
    """What the test before this one would miss if transformers or torch marked such caches by themselves."""
    model = random_llama(MODELS[tiny])
    cache = cuda_worker.StaticCache(config=model.config, max_cache_len=16)
    model.compile(backend="eager")
    model(torch.ones(1, 4, dtype=torch.long), use_cache=True, **{cuda_worker.cache_argument(model): cache})
    assert getattr(cache.layers[0].keys, "_dynamo_static_input_type", None) is None


def test_a_baseline_without_graphs_is_an_error(tiny, monkeypatch, no_grad):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **settings: None)
    bench = Bench()
    bench.prepare(tiny, "inductor", **SIZES, device="cpu")
    counters = torch._dynamo.utils.counters["inductor"]
    monkeypatch.setitem(counters, "cudagraph_skips", 0)
    bench.row(None, generates=False)
    counters["cudagraph_skips"] = 7
    with pytest.raises(NotGraphed, match="left out CUDA graphs 7 times"):
        bench.row(None, generates=False)


def test_plain_transformers_is_measured_too(tiny, no_grad):
    bench = Bench()
    bench.prepare(tiny, "eager", **SIZES, device="cpu")
    row = bench.row(None)
    assert (row["argmax"], row["nan"], row["captures"], row["kept_tokens_per_s"]) == (1.0, False, None, None)
    assert row["generate_tokens_per_s"] > 0


def test_logits_that_are_no_numbers_are_noticed(tiny, no_grad):
    bench = Bench()
    bench.prepare(tiny, "eager", **SIZES, device="cpu")
    bench.model.lm_head.weight[0] = float("nan")
    row = bench.row(None, generates=False)
    assert row["nan"]
    assert row["cosine"] is None


def event(name, start, end, on_device=True):
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    return types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=start, end=end))


def test_a_profile_is_counted():
    """Microseconds of two tokens: overlapping kernels count once; the loop's own two waits do not."""
    events = [
        *(event("kernel", start, start + 4) for start in (0, 2, 10, 20)),
        event("Memcpy DtoH", 30, 32),
        *(event("cudaGraphLaunch", 0, 1, on_device=False) for _ in range(4)),
        *(event("cudaDeviceSynchronize", 0, 1, on_device=False) for _ in range(2)),
        *(event("cudaEventSynchronize", 0, 1, on_device=False) for _ in range(6)),
    ]
    assert counted(events, tokens=2) == {
        "kernels": 2,
        "graphs": 2,
        "waits": 3,
        "device_seconds": pytest.approx((6 + 4 + 4 + 2) / 2 * 1e-6),
    }
    assert counted(events, tokens=2, own=6)["waits"] == 1
    assert covered([]) == 0


class TestInt4:
    """torch's own 4-bit product as a baseline."""

    def test_a_layer_computes_its_grid(self):
        weight = torch.randn(32, 256, dtype=torch.bfloat16)
        layer, x = Int4Linear(weight, 64), torch.randn(2, 3, 256, dtype=torch.bfloat16)
        grid = quantize(weight, 64, "rtn").rounded(torch.bfloat16).dequantize()
        expected = x.float() @ grid.T
        assert layer(x).shape == (2, 3, 32)
        assert (layer(x).float() - expected).abs().max() < 0.02 * expected.abs().max()

    def test_the_cuda_kernel_gets_pairs_of_weights_and_scales_by_group(self, monkeypatch):
        packed = []

        def convert(pairs, tiles):
            packed.append((pairs, tiles))
            return pairs

        aten = types.SimpleNamespace(_convert_weight_to_int4pack=convert)
        monkeypatch.setattr("benchmarks.int4_baseline.torch.ops", types.SimpleNamespace(aten=aten))
        grid = quantize(torch.randn(16, 256), 64, "rtn")
        packed_for_cuda(grid)
        ((pairs, tiles),) = packed
        assert (pairs.dtype, pairs.shape, tiles) == (torch.uint8, (16, 128), 8)
        assert torch.equal(pairs >> 4, grid.q[:, ::2])
        assert torch.equal(pairs & 15, grid.q[:, 1::2])
        table = scales_and_zeros(grid)
        assert table.shape == (4, 16, 2)
        assert torch.equal(table[1, 5], torch.stack([grid.scale[5, 1], grid.zero[5, 1]]).bfloat16())

    def test_layers_that_fit_are_replaced_and_the_head_is_not(self, tiny):
        model = random_llama(ModelShape("fits", 1, 128, 4, 2, 32, 256, 96))
        assert use_int4(model, 64) == 7
        assert type(model.lm_head) is torch.nn.Linear
        assert use_int4(random_llama(MODELS[tiny]), 64) == 4  # only `down` reads a multiple of 128 features
        assert not fits(12, 256)


def test_the_options_reach_the_rows(tiny):
    parsed = options(tiny, "--only", "asked", "--depths", "0", "2")
    assert [row.name for row in cuda_decode.rows_of(parsed)] == ["asked depth 2"]
