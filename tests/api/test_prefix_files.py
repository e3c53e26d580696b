"""Prompts that are kept on disk: a later process begins with one, and has the text and the scores of a fresh prompt."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import river_compile
from river_compile import RiverWarning
from river_compile.cli.app import main
from river_compile.compile_cache import folder
from river_compile.errors import OptionError
from tests.support.decoding import Scores
from tests.support.examples import examples
from tests.support.families import make, prompt
from tests.support.layout import ROOT, run_python

MANY = 17  # tokens of a prompt that run, at least
BLOCK = 64
OPTIONS = {"group_size": 32, "quantizer": "rtn", "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compile cache that the tests of this module share, so that one of them traces."""
    made = tmp_path_factory.mktemp("prefixes") / "compile_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVER_COMPILE_CACHE_DIR", str(made))
        yield made


@pytest.fixture(autouse=True)
def _no_prompts(cache):
    folder.clear(folder.PROMPTS)


def started(family="llama", dtype=torch.bfloat16, seed=0, change=None, prefix_cache=True, **options):
    """Does what a process does before its first call."""
    model = make(family, dtype, seed=seed, layers=2)
    if change is not None:
        change(model)
    return river_compile.accelerate(model, prefix_cache=prefix_cache, **{**OPTIONS, **options})


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options)


def ran(model, ids, batch=None):
    """Returns the text, the scores of all steps, and how many tokens of the prompt came from the disk."""
    before, noted = kept(model)["from_disk"], Scores()
    text = generate(batch or model, ids, logits_processor=[noted])
    for thread in threading.enumerate():
        if thread.name == "river prefixes":
            thread.join()
    return text, torch.cat(noted.steps), kept(model)["from_disk"] - before


def kept(model):
    return river_compile.report(model).to_dict()["kept_texts"]


def blocks(cache: Path) -> list[Path]:
    return sorted(cache.glob("prompts-*/*.block"))


def then(ids, length, seed):
    return torch.cat([ids, prompt(length, 1, seed=seed)], dim=1)


def assert_same(ours, fresh):
    assert torch.equal(ours[0], fresh[0])
    assert torch.equal(ours[1], fresh[1])


@pytest.fixture(scope="module")
def fresh(cache):
    """Runs a prompt in a model that has no prefix cache in memory or on disk."""
    model = started(prefix_cache=False)

    def run(ids):
        river_compile.empty_cache(model)
        return ran(model, ids)

    return run


READ = 300  # tokens of the first prompt: four blocks and one of 44 tokens
PROMPTS = {
    "itself": (lambda first: first, READ - MANY),
    "goes on": (lambda first: then(first, 30, 1), READ),
    "goes on, a little": (lambda first: then(first, 3, 1), READ + 3 - MANY),
    "parts in a block": (lambda first: then(first[:, :150], 60, 2), 150),
    "parts at a block": (lambda first: then(first[:, :128], 60, 2), 128),
    "parts in the last block": (lambda first: then(first[:, :290], 60, 2), 290),
    "is shorter": (lambda first: first[:, :200], 200 - MANY),
    "shares less than a block": (lambda first: then(first[:, : BLOCK - 1], 100, 3), 0),
    "shares nothing": (lambda first: prompt(READ, 1, seed=9), 0),
}


class TestALaterProcess:
    @pytest.mark.parametrize("name", PROMPTS)
    def test_runs_the_new_part_only(self, name, fresh):
        make_ids, expected = PROMPTS[name]
        first = prompt(READ, 1, seed=3)
        ran(started(), first)
        ids = make_ids(first)
        ours = ran(started(), ids)
        assert ours[2] == expected
        assert_same(ours, fresh(ids))

    @examples(6)
    @given(cuts=st.lists(st.integers(1, 330), min_size=2, max_size=3), threads=st.sampled_from([1, 2]))
    def test_has_a_fresh_prompts_bits_whatever_others_wrote(self, cuts, threads, fresh):
        """Texts that part at any places, each for a model that has just started, on other numbers of threads."""
        folder.clear(folder.PROMPTS)
        before, text = torch.get_num_threads(), prompt(330, 1, seed=5)
        try:
            torch.set_num_threads(threads)
            for number, cut in enumerate(cuts):
                ids = then(text[:, :cut], 300 - min(cut, 290), 20 + number)
                assert_same(ran(started(), ids), fresh(ids))
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("family", ["gemma3", "qwen2"])
    def test_of_other_families(self, family):
        """Sliding windows, biases."""
        first = prompt(READ, 1, seed=3)
        ran(started(family), first)
        ids = then(first, 30, 1)
        ours, theirs = ran(started(family), ids), ran(started(family, prefix_cache=False), ids)
        assert ours[2] == READ
        assert_same(ours, theirs)

    def test_is_a_process(self, cache, fresh, tmp_path):
        """The first one ends immediately: what it wrote is whole."""
        code = (
            "from tests.api.test_prefix_files import *\n"
            "found = generate(model := started(), {ids})\n"
            "print(json.dumps([found.tolist(), kept(model)['from_disk']]))"
        )
        first = prompt(READ, 1, seed=3)
        for ids, expected in ((first, 0), (then(first, 30, 1), READ)):
            said = run_python(code.format(ids=f"torch.tensor({ids.tolist()})"), tmp_path, ROOT).stdout
            text, read = json.loads(said)
            assert text == fresh(ids)[0].tolist()
            assert read == expected

    def test_in_a_batch_has_the_same(self, fresh):
        """Prompts in pieces, as a server's: they write, and read."""
        first = prompt(READ, 1, seed=3)
        for ids, expected in ((first, 0), (then(first, 30, 1), READ)):
            model = started()
            with river_compile.ContinuousBatch(model, 2) as batch:
                ours = ran(model, ids, batch)
            assert ours[2] == expected
            assert_same(ours, fresh(ids))

    def test_takes_what_is_in_memory_if_it_is_longer(self):
        model, ids = started(), prompt(READ, 1, seed=3)
        ran(model, ids)
        assert ran(model, then(ids, 30, 1))[2] == 0
        assert kept(model)["reused"] == READ


def _one_element(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1.0


def _one_norm(model):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] *= 1.5


def _buffer(model):
    model.model.rotary_emb.inv_freq *= 0.5


def _setting(model):
    model.model.layers[1].self_attn.scaling = 0.5


def _adapter(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert adapted.get_base_model() is model


def _quantized(model):
    import torchao.quantization as torchao

    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


OTHERS = {
    "one element": {"change": _one_element},
    "one norm": {"change": _one_norm},
    "a buffer": {"change": _buffer},
    "a setting": {"change": _setting},
    "an adapter": {"change": _adapter},
    "8-bit weights": {"change": _quantized},
    "another option": {"target_weights": "model"},
    "another seed": {"seed": 1},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_never_matches(other):
    pytest.importorskip("peft" if other == "an adapter" else "torchao")
    ids = prompt(READ, 1, seed=3)
    ran(started(), ids)
    torch.manual_seed(0)
    ours = ran(started(**OTHERS[other]), ids)
    torch.manual_seed(0)
    fresh = ran(started(**OTHERS[other], prefix_cache=False), ids)
    assert ours[2] == 0
    assert_same(ours, fresh)


def test_a_model_that_changes_after_its_prompt_is_another(fresh):
    """Each state has its own files; the earlier one finds its prompt again."""
    model, ids = started(), prompt(READ, 1, seed=3)
    ran(model, ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _one_element(model)
    changed = ran(model, ids)
    assert changed[2] == 0
    assert not torch.equal(changed[1], fresh(ids)[1])
    model.load_state_dict(before)
    again = ran(model, ids)
    assert again[2] == READ - MANY
    assert_same(again, fresh(ids))


@pytest.mark.parametrize(
    ("tokens", "options"),
    [(255, {}), (READ, {"dtype": torch.float32}), (READ, {"prefix_cache": False}), (READ, {"prefill": "exit"})],
    ids=["a short prompt", "float32", "not asked for", "prompts that exit"],
)
def test_writes_nothing(tokens, options, cache):
    if "prefill" in options:
        options = {**options, "quality": "fast", "num_assistant_tokens": None, "num_assistant_tokens_schedule": None}
        model = make("llama", torch.bfloat16, layers=2)
        given = {"group_size": 32, "quantizer": "rtn", "prefill": "exit", "quality": "fast"}
        model = river_compile.accelerate(model, prefix_cache=True, **given)
    else:
        model = started(**options)
    ran(model, prompt(tokens, 1, seed=3))
    assert blocks(cache) == []


def _truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _flip_the_ids(file: Path):
    content = file.read_bytes()
    at = content.index(b'"ids":"[') + 8
    file.write_bytes(content[:at] + (b"9" if content[at : at + 1] != b"9" else b"8") + content[at + 1 :])


def _empty(file: Path):
    file.write_bytes(b"")


def _swap(file: Path):
    other = next(other for other in file.parent.glob("*.block") if other != file)
    file.write_bytes(other.read_bytes())


class TestDamage:
    @pytest.mark.parametrize("harm", [_truncate, _flip, _flip_the_ids, _empty, _swap], ids=lambda harm: harm.__name__)
    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_costs_a_warning(self, harm, place, cache, fresh):
        """The tokens before it are reused, the others run, and it is written again."""
        if (harm, place) == (_flip_the_ids, 4):
            pytest.skip("a short block is not read if its ids are others")
        ids = prompt(READ, 1, seed=3)
        ran(started(), ids)
        harm(_in_order(cache)[place])
        longer = then(ids, 30, 1)
        with pytest.warns(RiverWarning, match="^RC103: The cached file .* is damaged and is rebuilt"):
            ours = ran(started(), longer)
        assert ours[2] == place * BLOCK
        assert_same(ours, fresh(longer))
        assert ran(started(), longer)[2] == READ + 30 - MANY

    def test_a_missing_block_ends_what_is_reused(self, cache, fresh):
        ids = prompt(READ, 1, seed=3)
        ran(started(), ids)
        _in_order(cache)[2].unlink()
        ours = ran(started(), ids)
        assert ours[2] == 2 * BLOCK
        assert_same(ours, fresh(ids))


def _in_order(cache: Path) -> list[Path]:
    """Returns the blocks of the only prompt."""
    after = {file.name.split("-")[0]: file for file in blocks(cache)}
    found, name = [], "0" * 32
    while name in after:
        found.append(after[name])
        name = after[name].stem.split("-")[1]
    assert len(found) == len(after)
    return found


class TestTheFolder:
    def test_is_private(self, cache):
        before = os.umask(0)
        try:
            ran(started(), prompt(READ, 1, seed=3))
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in blocks(cache)} == {0o600}
        assert {file.parent.stat().st_mode & 0o777 for file in blocks(cache)} == {0o700}

    def test_is_ignored_if_others_may_write_to_it(self, cache):
        ids = prompt(READ, 1, seed=3)
        ran(started(), ids)
        (entry,) = {file.parent for file in blocks(cache)}
        entry.chmod(0o777)
        with pytest.warns(RiverWarning, match="^RC102"):
            assert ran(started(), ids)[2] == 0
        shutil.rmtree(entry)

    def test_loses_the_least_recently_used_blocks(self, cache, monkeypatch):
        """Of three prompts the second one is used last; the end of the first goes before its beginning."""
        texts = [prompt(READ, 1, seed=seed) for seed in (3, 4)]
        for ids in texts:
            ran(started(), ids)
            time.sleep(0.05)  # their times of use, of which a file system keeps milliseconds, differ
        ran(started(), then(texts[0], 30, 1))
        others = [entry.folder for entry in folder.list_entries() if not entry.folder.name.startswith(folder.PROMPTS)]
        for other in others:  # blocks share the limit with them, so earlier tests would count
            shutil.rmtree(other)
        size = max(file.stat().st_size for file in blocks(cache))
        monkeypatch.setenv("RIVER_COMPILE_CACHE_SIZE_GB", str(7.5 * size / 1e9))
        folder.evict()
        monkeypatch.delenv("RIVER_COMPILE_CACHE_SIZE_GB")
        assert ran(started(), texts[0])[2] == READ - MANY
        assert 0 < ran(started(), texts[1])[2] < 4 * BLOCK

    def test_is_listed_and_cleared(self, cache, capsys):
        ran(started(), prompt(READ, 1, seed=3))
        assert main(["cache", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)["entries"]
        assert [entry["about"] for entry in listed if entry["about"].startswith("prompts")] == [
            "prompts of LlamaForCausalLM, 0M parameters"
        ]
        assert len(listed) > 1
        assert main(["cache", "--clear-prompts"]) == 0
        assert "freed" in capsys.readouterr().out
        assert main(["cache", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["entries"]) == len(listed) - 1

    def test_that_cannot_be_written_costs_a_warning(self, cache, fresh, monkeypatch):
        ids = prompt(READ, 1, seed=3)
        monkeypatch.setattr(folder, "_warned", set())

        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr("river_compile.decoding.prefix_files.write_tensors", full)
        with pytest.warns(RiverWarning, match="^RC104: .*No space left"):
            ours = ran(started(), ids)
        assert_same(ours, fresh(ids))
        assert blocks(cache) == []


def test_many_endings_after_one_beginning_are_bounded(cache):
    """Clients of one system prompt: its last tokens are reused, and their own are kept for the first few."""
    system = prompt(280, 1, seed=3)
    model = started()
    for number in range(12):
        found = ran(model, then(system, 20, 30 + number))
    names = [file.name.split("-")[0] for file in blocks(cache)]
    assert max(len([*same]) for _, same in itertools.groupby(sorted(names))) == 8
    assert ran(started(), then(system, 20, 99))[2] == 280
    assert found[2] == 0  # they were in memory


def test_it_requires_the_compile_cache():
    with pytest.raises(OptionError, match=r"^RC003: prefix_cache=True requires compile_cache=True"):
        started(compile_cache=False)
