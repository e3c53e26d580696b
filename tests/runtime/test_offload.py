"""Backbone offloading: the same bits with less memory, on files here and on pinned memory where there is a GPU.

The tests' own `WeightStore` stands for a GPU: its weights are NaN where they lie, arrive only when they are waited for,
and are spoilt once they were used.
"""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from river_compile import RiverWarning, report
from river_compile.api.accelerate import bring_back
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.errors import OptionError
from river_compile.exits import forced_depth
from river_compile.reporting.trace import trace
from river_compile.runtime import weight_store
from river_compile.runtime.weight_store import Arrival, MappedFiles, Stored, WeightStore
from river_compile.system import reserve
from tests.support.decoding import cache_state, decode, new_cache
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS, operators_on
from tests.support.recorder import recording
from tests.support.traced import TracedStep

LAYERS = 3
DEPTHS = [LAYERS, 0, 1, 2, LAYERS]
OPTIONS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1}
FETCH = {"offload": 1, "offload_policy": "fetch"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Elsewhere(WeightStore):
    """Weights that can only be computed with in the time between their arrival and their release."""

    where = "a test"

    def __init__(self) -> None:
        self.started: list[int] = []  # bytes of what was sent for
        self.brought: list[int] = []  # and of what was waited for
        self.copies: list[torch.Tensor] = []  # that were not released yet
        self.meanwhile: list[Callable[[], None]] = []  # to be called at the next arrival, one at each

    def check_room(self, nbytes):
        pass

    def put(self, tensor):
        return Stored(torch.full_like(tensor, float("nan")), tensor.clone())

    def take_back(self, stored):
        return stored.source.clone()

    def discard(self, tensor):
        tensor.fill_(float("nan"))

    def trim(self):
        pass

    def start(self, weights):
        self.started.append(sum(w.source.nbytes for w in weights))
        sent = tuple(torch.where(w.tensor.isnan(), w.source, w.tensor) for w in weights)  # (the caller may write there)
        return Arrival(tuple(torch.full_like(s, float("nan")) for s in sent), sent)

    def await_arrival(self, arrival):
        if self.meanwhile:
            self.meanwhile.pop()()
        self.brought.append(sum(t.nbytes for t in arrival.tensors))
        self.copies.append(arrival.tensors)
        for tensor, sent in zip(arrival.tensors, arrival.event, strict=True):
            tensor.copy_(sent)

    def release(self, weights):
        for tensors in self.copies:
            for tensor in tensors:
                tensor.fill_(float("nan"))
        self.copies.clear()

    def memory(self):
        return 7

    def peak(self):
        return 11


@pytest.fixture
def elsewhere(monkeypatch) -> Elsewhere:
    """Models that are offloaded inside the test go there."""
    store = Elsewhere()
    monkeypatch.setattr("river_compile.runtime.offload.make_store", lambda config, plan: store)
    return store


def compiled(options: dict, device: str = "cpu", name: str = "llama", **fields):
    model = make(name, layers=LAYERS, **fields).to(device)
    model.compile(backend=river, options={**OPTIONS, "kernels": operators_on(device), **options})
    return model


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(expected: dict, actual: dict) -> None:
    assert list(expected) == list(actual)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name].cpu()), name


@pytest.fixture(scope="module")
def reference():
    """What a model in memory decodes with forced depths, by kind of cache and depths: logits and cache."""
    model = compiled({})

    def run(kind: str, depths: list[int]):
        cache = new_cache(model, kind)
        return decode(model, cache, depths), cache

    wanted = [("static", DEPTHS), ("static", [2, 2, 2]), ("dynamic", DEPTHS)]
    return {(kind, tuple(depths)): run(kind, depths) for kind, depths in wanted}


def assert_same(expected, actual) -> None:
    for step, (a, b) in enumerate(zip(expected[0], actual[0], strict=True)):
        assert torch.equal(a, b), f"logits of step {step}"
    for layer, (a, b) in enumerate(zip(cache_state(expected[1]), cache_state(actual[1]), strict=True)):
        assert torch.equal(a[0], b[0]), f"keys of layer {layer}"
        assert torch.equal(a[1], b[1]), f"values of layer {layer}"
        assert a[2] == b[2], f"length of layer {layer}"


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.slow
def test_fetching_gives_the_bits_of_a_model_in_memory(elsewhere, reference, kind):
    """Every depth, prompt included. A block is sent for once: where a token needs it, or may need it next."""
    model = compiled(FETCH)
    decode(model, new_cache(model, kind), [0])  # a first decode step offloads: from here on prompts have to stream
    elsewhere.started.clear()
    cache = new_cache(model, kind)
    assert_same(reference[kind, tuple(DEPTHS)], (decode(model, cache, DEPTHS), cache))
    block = report(model).to_dict()["offloaded"]["moved"] // (LAYERS - 1)
    through, to_the_second = [block, block, 0], [block, block]  # (0: nothing comes after the last block)
    assert elsewhere.started == [*through, *through, *to_the_second, *through]
    assert elsewhere.brought == [block] * (2 + 2 + 1 + 2)


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("while they are on their way", "in place"),
        pytest.param("while they are on their way", "replaced", marks=pytest.mark.slow),
        pytest.param("before a prompt", "in place", marks=pytest.mark.slow),
        pytest.param("before a prompt", "replaced", marks=pytest.mark.slow),
    ],
)
def test_changed_weights_are_brought_in_anew(elsewhere, when, how):
    """Other weights loaded into an offloaded model give their logits, not those of a copy made before."""

    def change(block: torch.nn.Module) -> None:
        for parameter in (p for p in block.parameters() if p.dim() == 2):
            other = torch.full_like(parameter, 0.01)
            if how == "in place":
                parameter.copy_(other)
            else:
                parameter.data = other

    model, changed = compiled(FETCH), make("llama", layers=LAYERS)
    decode(model, new_cache(model, "static"), [0])  # a first decode step offloads
    with torch.no_grad():
        change(changed.model.layers[-1])
        if when == "before a prompt":
            change(model.model.layers[-1])
        else:
            elsewhere.meanwhile.append(lambda: change(model.model.layers[-1]))  # as block 2 arrives
    changed.compile(backend=river, options=OPTIONS)
    expected = decode(changed, new_cache(changed, "static"), [LAYERS])
    actual = decode(model, new_cache(model, "static"), [LAYERS])
    assert all(map(torch.equal, expected, actual))
    assert not elsewhere.meanwhile


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_stay_usable(device, tmp_path):
    """Bits, state_dict, save_pretrained, a copy and the plain model, while offloaded and after restore."""
    model = make("llama", layers=LAYERS, dtype=torch.bfloat16).to(device)
    before = weights_of(model)
    ids = prompt().to(device)
    with torch.no_grad():
        plain = model.forward(ids).logits
    model.compile(backend=river, options={**OPTIONS, **FETCH})
    model.generate(ids, max_new_tokens=3, do_sample=False)
    moved = report(model).to_dict()["offloaded"]["moved"]
    assert moved > 0
    assert_same_weights(before, model.state_dict())
    model.save_pretrained(tmp_path)
    assert_same_weights(before, type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict())
    assert_same_weights(before, copy.deepcopy(model).state_dict())
    with torch.no_grad():
        assert torch.equal(plain, model.forward(ids).logits)
    assert bring_back(model) == moved
    assert bring_back(model) == 0
    assert report(model).to_dict()["offloaded"] is None
    assert_same_weights(before, model.state_dict())
    model._compiled_call_impl = None
    with torch.no_grad():
        assert torch.equal(plain, model(ids).logits)


@pytest.mark.parametrize(
    "options",
    [{"threshold": 2.0}, {"criterion": "confidence", "threshold": 0, "graphs": True}],
    ids=["similarity", "confidence, captured"],
)
@pytest.mark.slow
@recording()
def test_exit_makes_every_token_leave_in_time(elsewhere, reference, options):
    """The rule never lets a token leave: it leaves at depth 2, with the bits of a forced depth 2 in memory."""
    model = compiled({**options, "offload": 2})
    cache = new_cache(model, "static")
    with trace() as seen:
        logits = decode(model, cache, [None] * 3)
    assert [step.depth for step in seen.tokens] == [2, 2, 2]
    assert_same(reference["static", (2, 2, 2)], (logits, cache))
    assert set(report(model).graphs[-1].candidates) <= {1}
    with pytest.raises(ValueError, match=r"Depth 3 is not available.*layer 2.*with offload_policy='fetch'"):
        decode(model, new_cache(model, "static"), [3])


def test_a_prompt_that_may_exit_does_so_in_time(elsewhere):
    model = compiled({"threshold": 2.0, "offload": 2, "prefill": "exit"})
    decode(model, new_cache(model, "static"), [])
    assert report(model).prefill_depths == {2: 1}


@pytest.mark.slow
@recording()
def test_blocks_that_move_are_not_captured(elsewhere, fresh_dynamo):
    """Spans end before the first offloaded block, which alone runs uncaptured; the report says why."""
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "output_logits": True}
    options |= {"return_dict_in_generate": True}
    logits = {}
    for graphs in (False, True):
        model = compiled({**FETCH, "offload": 2, "threshold": 2.0, "exit_every": 2, "graphs": graphs})
        logits[graphs] = [*model.generate(prompt(), **options).logits]
        for depth in (LAYERS, 2):
            with forced_depth(depth):
                logits[graphs] += model.generate(prompt(), **options).logits
    assert all(map(torch.equal, logits[False], logits[True]))
    captures = report(model).graphs[-1].captures
    assert set(captures.uncaptured_units) == {"span 2-3"}
    reason = captures.uncaptured_units["span 2-3"]
    assert "its weights have another address in every run (at model.layers.2)" in reason
    assert {c.unit for c in captures.captures} == {"span 0-1", "span 1-2", "span 0-2", "head", "tail 2"}


def test_shared_weights_stay(elsewhere):
    """A matrix that a resident block reads too, two views of one memory, and the tied embedding are not moved."""
    model = make("llama", layers=LAYERS)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    whole = torch.cat([layers[2].self_attn.k_proj.weight.data, layers[2].self_attn.v_proj.weight.data])
    layers[2].self_attn.k_proj.weight.data, layers[2].self_attn.v_proj.weight.data = whole.chunk(2)
    model.compile(backend=river, options={**OPTIONS, **FETCH})
    decode(model, new_cache(model, "static"), [LAYERS], plain_prompt=True)
    away = {name for name, p in model.named_parameters() if p.isnan().any()}
    assert {name.split(".")[2] for name in away} == {"1", "2"}
    matrices = {name for name, p in model.named_parameters() if "layers." in name and p.dim() == 2}
    stay = {"layers.1.mlp.up_proj", "layers.2.self_attn.k_proj", "layers.2.self_attn.v_proj"}
    expected = {n for n in matrices if ".layers.0." not in n and not any(s in n for s in stay)}
    assert away == expected
    assert report(model).to_dict()["offloaded"]["kept"] > 0


@pytest.mark.slow
def test_other_options_move_weights_back(elsewhere):
    model = compiled({"offload": 1, "offload_policy": "fetch"})
    decode(model, new_cache(model, "static"), [1])
    far = report(model).to_dict()["offloaded"]["moved"]
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, "offload": 2})
    decode(model, new_cache(model, "static"), [1])
    assert report(model).to_dict()["offloaded"]["moved"] == far // 2
    torch._dynamo.reset()
    model.compile(backend=river, options=OPTIONS)
    decode(model, new_cache(model, "static"), [1])
    assert report(model).to_dict()["offloaded"] is None
    assert not any(p.isnan().any() for p in model.parameters())


def test_exact_mode_streams_the_backbone_once_for_many_tokens(elsewhere):
    """Weights come in once for each verifying pass, as the report says, and drafts may be long."""
    model = make("llama", layers=LAYERS)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every token is the first of the vocabulary, so every draft holds
    model.compile(backend=river, options={**OPTIONS, **FETCH})
    model.generate(
        prompt(8), max_new_tokens=129, do_sample=False, custom_generate=exact, num_assistant_tokens_schedule="constant"
    )
    stats, cycles = report(model).to_dict()["offloaded"], report(model).exact.cycles
    assert cycles == 2, "63 drafted tokens and the backbone's own"
    assert stats["brought_in"] == sum(elsewhere.started)
    assert stats["brought_in"] == cycles * stats["moved"], "the prompt ran before they left"


@pytest.mark.slow
def test_exact_mode_streams_or_is_refused():
    model, ids = make("llama", layers=LAYERS), prompt(8)
    settings = {"max_new_tokens": 12, "do_sample": False}
    exactly = {**settings, "custom_generate": exact, "num_assistant_tokens_schedule": "constant"}
    plain = model.generate(ids, **settings)
    model.compile(backend=river, options={**OPTIONS, **FETCH})
    assert torch.equal(model.generate(ids, **exactly), plain)
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, "offload": 1})
    with pytest.raises(ValueError, match=r"layer 1.*Use offload_policy='fetch'"):
        model.generate(ids, **exactly)


def test_depths_and_folders_are_checked_before_anything_is_packed(tmp_path, monkeypatch):
    def message(**options) -> str:
        step = TracedStep(layers=LAYERS)
        with pytest.raises(OptionError) as error:
            step.run(quantizer="rtn", **options)
        assert not report(step.model).packed
        return str(error.value)

    assert "offload=3 leaves none of 3 layers" in message(offload=3)
    absent = tmp_path / "absent"
    assert f"Cannot write to offload_dir='{absent}'" in message(offload=2, offload_dir=absent)
    monkeypatch.setattr(weight_store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "has 0.0 MB free, and the weights take 0.1 MB" in message(offload=2, offload_dir=tmp_path)


def test_a_disk_that_fills_up_moves_nothing(monkeypatch, tmp_path):
    """Another process takes the room between the check and the last matrix."""
    reserve, calls = weight_store.os.posix_fallocate, []

    def fallocate(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return reserve(*arguments)

    step = TracedStep(layers=LAYERS)
    before = [p.data_ptr() for p in step.model.parameters()]
    monkeypatch.setattr(weight_store.os, "posix_fallocate", fallocate)
    with pytest.raises(OptionError, match="Make room, or name another folder"):
        step.run(quantizer="rtn", offload=2, offload_dir=tmp_path)
    assert [p.data_ptr() for p in step.model.parameters()] == before
    assert report(step.model).to_dict()["offloaded"] is None


def test_where_the_system_cannot_allocate_a_file_it_is_written(monkeypatch, tmp_path):
    """As on macOS: a page that was never written has no room for certain."""
    write, written = os.pwrite, []
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, "pwrite", lambda *call: written.append(write(*call)))
    for nbytes in (1, 4096, 3 * 2**20 + 5):
        written.clear()
        with (tmp_path / str(nbytes)).open("wb") as file:
            reserve(file.fileno(), nbytes)
            assert os.fstat(file.fileno()).st_size == sum(written) == nbytes


def test_a_folder_in_memory_is_reported(monkeypatch, tmp_path):
    assert weight_store.file_system(Path("/proc")) == "proc"
    monkeypatch.setattr(weight_store, "file_system", lambda folder: "tmpfs")
    with pytest.warns(RiverWarning, match="is in memory"):
        MappedFiles(tmp_path).check_room(0)


def test_the_report_tells_what_left(tmp_path):
    step = TracedStep(layers=LAYERS)
    model = step.model
    step.run(depth=1, quantizer="rtn", offload=1, offload_dir=tmp_path)
    reported = report(model)
    stats = reported.to_dict()["offloaded"]
    matrices = sum(p.nbytes for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    everything = sum(p.nbytes for p in {*model.parameters()}) + sum(p.nbytes for p in reported.packed)
    assert stats["moved"] == matrices * 2 // 3
    assert abs(stats["weights"] - everything) < 1000  # (the rotary embedding's frequencies count too)
    assert stats["peak_before"] > stats["moved"]
    assert stats["peak_after"] > 0
    assert f"layers 2 to 3, {stats['moved'] / 1e6:.1f} MB in memory-mapped files in {tmp_path}; 'exit'" in str(reported)
    assert "at latest    after layer 1" in str(reported)
    assert json.loads(json.dumps(reported.to_dict()))["offloaded"]["resident"] == stats["resident"]


@pytest.mark.slow
def test_nothing_of_a_freed_model_stays():
    def mapped() -> int:
        return sum("(deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = mapped()
    model = compiled(FETCH)
    decode(model, new_cache(model, "static"), [LAYERS, 2])
    assert mapped() > before
    del model
    torch._dynamo.reset()
    gc.collect()
    assert mapped() == before


RESIDENT = """
import ctypes, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from river_compile import report
from river_compile.backend import river
from tests.support.lowerings import OPERATORS

def resident():
    libraries = everything = 0
    with open("/proc/self/smaps") as maps:
        for line in maps:
            words = line.split()
            if not words[0].endswith(":"):
                library = ".so" in line
            elif words[0] == "Rss:":
                everything += int(words[1]) * 1024
                libraries += library * int(words[1]) * 1024
    return everything, everything - libraries

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                     num_key_value_heads=8, eos_token_id=None, pad_token_id=0)
model = LlamaForCausalLM(config).eval()
options = {"kernels": OPERATORS, "quantizer": "rtn", "first_exit": 1}
model.compile(backend=river, options={**options, **eval(sys.argv[1])})
ids = torch.ones(1, 4, dtype=torch.long)
for _ in range(2):
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, cache_implementation="static")
stats = report(model).to_dict()["offloaded"]
ctypes.CDLL(None).malloc_trim(0)
print(*resident(), stats["moved"] if stats else 0, stats["peak_after"] if stats else 0)
"""


@pytest.mark.slow
def test_a_process_shrinks_by_what_left():
    """Two processes differ in one option; after two prompts, the second of which streamed, so do their sizes.

    Pages of libraries are left out: how many of them are resident depends on what the page cache held before.
    """

    def run(options: dict) -> list[int]:
        root = str(Path(__file__).resolve().parents[2])
        done = subprocess.run([sys.executable, "-c", RESIDENT, repr(options)], capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()]

    (_, whole, _, _), (everything, rest, moved, peak) = run({}), run({"offload": 2})
    block = 4 * (4 * 512 * 512 + 3 * 512 * 2048)  # 17 MB
    assert moved == 6 * block
    assert whole - rest > moved - 2.5 * block  # two blocks may be there: what streamed last, and what was to be next
    assert peak < everything + 3 * block


@pytest.mark.gpu
def test_device_memory_shrinks_by_what_left():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    model = model.cuda()
    before = torch.cuda.memory_allocated()
    model.compile(backend=river, options={"quantizer": "rtn", "offload": 2})
    ids = torch.ones(1, 16, dtype=torch.long, device="cuda")
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    settings["disable_compile"] = True  # on a GPU transformers would compile the call, past River
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    stats = report(model).to_dict()["offloaded"]
    packed = sum(p.nbytes for p in report(model).packed)
    torch.cuda.synchronize()
    assert stats["moved"] > 5.9 * block
    assert torch.cuda.memory_allocated() < before + packed - 0.9 * stats["moved"]
    torch.cuda.reset_peak_memory_stats()
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    # Two or three blocks stream.
    assert torch.cuda.max_memory_allocated() < before + packed - 0.9 * stats["moved"] + 3.5 * block
    with forced_depth(2):
        assert model.generate(ids, attention_mask=torch.ones_like(ids), **settings).shape == (1, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_streams_give_the_bits_of_a_model_in_memory(graphs):
    """Through the side stream and its events, with and without captured pieces in front."""

    def run(options: dict):
        torch._dynamo.reset()
        model = compiled({**options, "threshold": 2.0, "graphs": graphs}, "cuda")
        settings = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static"}
        settings["disable_compile"] = True  # on a GPU transformers would compile the call, past River
        texts = [model.generate(prompt().cuda(), **settings) for _ in range(2)]
        assert bool(report(model).to_dict().get("offloaded")) == ("offload" in options)
        return texts

    assert all(map(torch.equal, run({}), run(FETCH)))
