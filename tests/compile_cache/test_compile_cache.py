"""What one process built the next one runs without Dynamo: the same text, and never from another model."""

from __future__ import annotations

import ast
import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from river_compile import RiverConfig, RiverWarning, accelerate, report, restore
from river_compile.cli.app import main
from river_compile.compile_cache import folder
from river_compile.compile_cache.identity import identity_of
from river_compile.kernels.native.build import CannotBuild
from tests.support.examples import slow_but
from tests.support.families import FAMILIES, make, prompt
from tests.support.layout import ROOT, run_python
from tests.support.lowerings import INDUCTOR, OPERATORS, UNQUANTIZED

OPTIONS = {"kernels": "native", "group_size": 32, "quantizer": "rtn"}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path / "compile_cache"))
    return tmp_path / "compile_cache"


def generate(model, ids, **arguments):
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)


def start(name: str = "llama", quality: str = "exact", ids=None, change=None, max_new_tokens=12, **options):
    """Does what a process does: makes a model, accelerates it, generates. Returns the text, and graphs traced."""
    torch._dynamo.reset()
    counters.clear()
    model = make(name, layers=3)
    if change is not None:
        change(model)
    accelerate(model, quality, **{**OPTIONS, **options})
    text = generate(model, prompt() if ids is None else ids, max_new_tokens=max_new_tokens)
    traced = counters["frames"]["ok"]
    found = report(model)
    restore(model)
    return text, traced, found


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What the first process left, and the text that it wrote."""
    folder = tmp_path_factory.mktemp("first") / "compile_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVER_COMPILE_CACHE_DIR", str(folder))
        text, traced, _ = start()
    assert traced > 0
    return folder, text


@pytest.fixture
def used(cache, first) -> Path:
    """A compile cache that a first process has filled."""
    shutil.copytree(first[0], cache)
    return cache


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name[0] != ".")


class TestASecondStart:
    def test_traces_nothing_and_writes_the_same_text(self, used, first):
        second, none, found = start()
        assert none == 0
        assert torch.equal(first[1], second)
        assert {graph.origin for graph in found.graphs} == {"stored"}
        assert "prefill        3 layers, static cache, from the compile cache;" in str(found)
        assert {twin.folder for graph in found.graphs for twin in graph.twins} == {
            str(next(used.glob("twins-*/packed")))
        }

    def test_imports_no_compiler(self, used, first, tmp_path):
        """A new process imports what it runs. (transformers itself has imported Dynamo: `masking_utils`.)"""
        code = f"""
import sys
import torch
from tests.support.families import make, prompt

model, ids = make("llama", layers=3), prompt()
before = set(sys.modules)
assert "river_compile" not in before
import river_compile

river_compile.accelerate(model, **{OPTIONS})
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
origins = {{graph.origin for graph in river_compile.report(model).graphs}}
compilers = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch._export", "torch.export", "triton")
print([text.tolist(), origins, sorted(name for name in set(sys.modules) - before if name.startswith(compilers))])
"""
        text, origins, imported = ast.literal_eval(run_python(code, tmp_path, ROOT).stdout)
        assert text == first[1].tolist()
        assert origins == {"stored"}
        assert imported == []

    def test_leaves_at_the_same_depths(self, cache):
        """By the default rule of "fast", with twins from the cache."""
        (text, traced, found), (again, none, later) = start(quality="fast"), start(quality="fast")
        assert traced > 0 == none
        assert torch.equal(text, again)
        assert found.decode_depths == later.decode_depths

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FAMILIES)
    def test_of_each_family(self, cache, name):
        """Windows that fill up on the way, experts: whatever is read, the text is plain generation's."""
        start(name)
        second, _, _ = start(name)
        assert torch.equal(second, generate(make(name, layers=3), prompt()))

    def test_without_the_kernels_runs_plainly(self, used, monkeypatch):
        def refuses(*_):
            raise CannotBuild("it knows no such flag")

        monkeypatch.setattr("river_compile.kernels.native.load.load", refuses)
        monkeypatch.setattr("river_compile.lowering.inductor.compile_fx", lambda graph, *_, **__: graph.forward)
        with pytest.warns(RiverWarning, match="^RC100: Could not compile River's C.. kernels"):
            text, _, found = start()
        assert torch.equal(text, generate(make("llama", layers=3), prompt()))
        assert found.graphs
        assert all(graph.refusal for graph in found.graphs)

    def test_runs_prompts_of_other_lengths_in_the_same_program(self, used):
        for length in (2, 5, 40):
            text, none, _ = start(ids=prompt(length, seed=length))
            assert none == 0
            assert torch.equal(text, generate(make("llama", layers=3), prompt(length, seed=length)))

    def test_may_have_a_batch_that_the_first_had_not(self, used):
        text, traced, _ = start(ids=prompt(9, batch=3))
        assert traced > 0
        assert torch.equal(text, generate(make("llama", layers=3), prompt(9, batch=3)))

    def test_frees_the_model_with_all_that_was_read(self, used):
        torch._dynamo.reset()
        model = accelerate(make("llama", layers=3), **OPTIONS)
        generate(model, prompt())
        gone = weakref.ref(model.get_parameter("model.layers.0.mlp.up_proj.weight"))
        del model
        gc.collect()
        assert gone() is None


CHANGES = {
    "a setting": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "an attribute of a module": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "a dict of a module": lambda model: setattr(model.model.layers[1].self_attn, "scales", {"a": [1.0, 2.0]}),
    "a dtype": lambda model: model.bfloat16(),
    "a shape": lambda model: model.resize_token_embeddings(130),
    "attention": lambda model: setattr(model.config, "_attn_implementation", "eager"),
    "a class": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.GELU().eval()),
}


HOOKED = {
    "in training": lambda model: model.train(),
    "with a hook": lambda model: model.model.layers[1].register_forward_hook(lambda *_: None),
}


class TestAnotherModel:
    def test_gets_twins_of_its_own_after_one_element_changed(self, cache):
        """The programs are the same, so only the weights' hash can tell."""

        def change(model):
            with torch.no_grad():
                model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] += 1.0

        start(quality="fast", exit_depth=0)
        text, none, found = start(quality="fast", exit_depth=0, change=change)
        assert none == 0
        assert {twin.folder for graph in found.graphs for twin in graph.twins} == {""}
        os.environ["RIVER_COMPILE_CACHE_DIR"] = "0"
        assert torch.equal(text, start(quality="fast", exit_depth=0, change=change)[0])

    def test_of_other_code_is_traced_anew(self, used, monkeypatch):
        """One line of the model's class is another one."""

        def halved(self, x):
            return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", halved)
        _forget_code()
        text, traced, _ = start()
        assert traced > 0
        assert torch.equal(text, generate(make("llama", layers=3), prompt()))
        monkeypatch.undo()
        _forget_code()

    def test_is_not_made_by_functions_that_dynamo_adds(self, monkeypatch):
        """After a graph break, Dynamo puts the rest of a function into its module."""
        model = make("llama", layers=2)
        _forget_code()
        before = identity_of(model, "")
        resumed = lambda: 1.0  # noqa: E731
        monkeypatch.setattr(modeling_llama, "torch_dynamo_resume_in_forward_at_1", resumed, raising=False)
        _forget_code()
        assert identity_of(model, "") == before

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_has_another_identity(self, change):
        model, other = make("llama", layers=2), make("llama", layers=2)
        assert identity_of(model, "") == identity_of(other, "") != identity_of(other, "other options")
        change(other)
        assert identity_of(other, "") not in (None, identity_of(model, ""))

    def test_has_another_identity_with_another_attention_of_the_same_name(self, monkeypatch):
        model = make("llama", layers=2)
        before = identity_of(model, "")
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, model.config._attn_implementation, lambda *args, **kwargs: args)
        assert identity_of(model, "") not in (None, before)

    def test_has_another_identity_with_another_lowering(self):
        model, ways = make("llama", layers=2), ("auto", OPERATORS, UNQUANTIZED, INDUCTOR)
        first, again = ([identity_of(model, RiverConfig(kernels=way)) for way in ways] for _ in range(2))
        assert first == again
        assert len({*first}) == len(ways)

    @pytest.mark.parametrize("library", ["torch", "transformers"])
    def test_has_another_identity_with_another_version(self, library, monkeypatch):
        model = make("llama", layers=2)
        before = identity_of(model, "")
        version = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == library else version(name))
        _forget_code()
        assert identity_of(model, "") not in (None, before)
        monkeypatch.undo()
        _forget_code()

    @pytest.mark.parametrize("change", HOOKED.values(), ids=HOOKED)
    def test_has_none(self, change):
        model = make("llama", layers=2)
        change(model)
        assert identity_of(model, "") is None


def _forget_code():
    """As a new process, which looks at code and versions a single time."""
    from river_compile.compile_cache import identity

    identity._hash_code.cache_clear()
    identity._versions.cache_clear()


def _of_another_type(file):
    """As an earlier version may have written it: whole, its hash right, a field of another type."""
    if file.suffix != ".pass":  # (twins are tensors)
        return
    entry = folder.Entry(file.parent.name)
    program = json.loads(entry.read(file.name))
    program["program"]["candidates"] = "all"
    file.unlink()
    entry.write(file.name, json.dumps(program).encode())


def _changed(change):
    return lambda file: file.write_bytes(change(file.read_bytes()))


DAMAGE = {
    "cut": _changed(lambda content: content[: len(content) // 2]),
    "empty": _changed(lambda content: b""),
    "one byte": _changed(lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]),
    "foreign": _changed(lambda content: b"\x80\x05 something else altogether"),
    "another type": _of_another_type,
}


class TestADamagedCache:
    @pytest.mark.parametrize("damage", slow_but(["one byte", "another type"], DAMAGE))
    def test_costs_a_warning_and_a_fresh_build(self, used, first, damage):
        for file in files(used):
            DAMAGE[damage](file)
        with pytest.warns(match="is rebuilt"):
            second, traced, _ = start()
        assert traced > 0
        assert torch.equal(first[1], second)
        assert [file.relative_to(used).parts[0] for file in files(used)] == [
            file.relative_to(first[0]).parts[0] for file in files(first[0])
        ]
        assert torch.equal(first[1], start()[0])

    def test_is_noticed_where_it_is_read(self, used):
        """A prompt waits for its own program alone: that of decode steps is read with the first of them."""
        told = []
        for file in (file for file in files(used) if file.suffix == ".pass"):
            whole = file.read_bytes()
            DAMAGE["one byte"](file)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                start(max_new_tokens=1)
            told.append(any("is rebuilt" in str(warning.message) for warning in caught))
            file.write_bytes(whole)
        assert sorted(told) == [False, True]

    @pytest.mark.parametrize("ending", [".pass", ".safetensors"])
    def test_with_files_of_another_model_costs_a_warning_and_a_fresh_build(self, used, first, ending):
        """Programs of the same inputs with another constant, and twins of other weights."""

        def change(model):
            if ending == ".pass":
                for module in model.modules():
                    if hasattr(module, "variance_epsilon"):
                        module.variance_epsilon = 1.0
            else:
                model.load_state_dict(make("llama", layers=3, seed=1).state_dict())

        (mine,) = {file.parent for file in used.rglob(f"*{ending}")}
        assert not torch.equal(start(change=change)[0], first[1])
        (other,) = {file.parent for file in used.rglob(f"*{ending}")} - {mine}
        shutil.rmtree(mine)
        other.rename(mine)
        with pytest.warns(match="RC103"):
            text, _, _ = start()
        assert torch.equal(text, first[1])
        assert torch.equal(start()[0], first[1])

    @pytest.mark.slow
    def test_that_is_full_costs_a_warning(self, tmp_path):
        """A limit on the size of files stands for a disk without space: twins and programs exceed it."""
        code = (
            "import resource, warnings; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "from tests.compile_cache.test_compile_cache import start\n"
            "from tests.support.lowerings import OPERATORS\n"
            "with warnings.catch_warnings(record=True) as said:\n"
            "    warnings.simplefilter('always')\n"
            "    text = start(kernels=OPERATORS)[0].tolist()\n"
            "print([text, [str(w.message)[:6] for w in said if 'RC' in str(w.message)]])"
        )
        environment = {**os.environ, "RIVER_COMPILE_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        text, said = ast.literal_eval(done.stdout)
        assert text == generate(make("llama", layers=3), prompt()).tolist()
        assert said == ["RC104:"]
        assert max((file.stat().st_size for file in files(tmp_path)), default=0) < 4096

    def test_that_cannot_be_written_is_told_once(self, tmp_path, monkeypatch, recwarn):
        blocked = tmp_path / "a file"
        blocked.write_text("")
        monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(blocked))
        for name in "ab":
            folder.Entry("entry").write(name, b"content")
        (told,) = [str(warning.message) for warning in recwarn if "the compile cache" in str(warning.message)]
        assert "RIVER_COMPILE_CACHE_DIR=0" in told


class TestWithoutIt:
    def test_nothing_is_written_if_the_environment_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
        monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", "0")
        start(kernels="auto")
        assert not (tmp_path / "compile_cache").exists()

    def test_nothing_is_written_if_the_call_says_so(self, cache):
        start(compile_cache=False)
        assert not cache.exists()


class TestACacheThatOthersMayWriteTo:
    """What lies there is not read, and nothing is written: one warning names the fix."""

    @pytest.mark.parametrize("what", ["the cache", "an entry", "a file"])
    def test_is_ignored(self, used, first, what):
        entries = {file.parent for file in used.rglob("*.pass")}
        paths = {"the cache": [used], "an entry": entries, "a file": [*used.rglob("*.pass")]}[what]
        for path in paths:
            path.chmod(0o777)
        with pytest.warns(RiverWarning, match=r"ignores .*: others may write to it \(mode 0777\)\. Run chmod -R go-w"):
            text, traced, _ = start()
        assert torch.equal(text, first[1])
        assert traced > 0

    def test_of_another_user_is_ignored(self, used, first, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.warns(RiverWarning, match=r"ignores .*: it belongs to another user .*\. Set RIVER_COMPILE_HOME"):
            text, traced, _ = start()
        assert torch.equal(text, first[1])
        assert traced > 0


def test_no_other_user_may_write_to_entries(cache):
    """Whatever the process's mask says."""
    before = os.umask(0)
    try:
        start()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (cache, *cache.rglob("*")) if path.name[0] != "."}
    assert modes <= {0o700, 0o600}
    assert {path.stat().st_mode & 0o777 for path in cache.rglob("*.pass")} == {0o600}


def test_the_oldest_entries_are_evicted(cache, monkeypatch):
    for number in range(4):
        folder.Entry(f"entry{number}").write("x", bytes(1000))
        os.utime(cache / f"entry{number}", (number, number))
    monkeypatch.setenv("RIVER_COMPILE_CACHE_SIZE_GB", str(2500 / 1e9))
    folder.evict()
    assert sorted(path.name for path in cache.iterdir()) == ["entry2", "entry3"]


@pytest.mark.parametrize(("limit", "entries", "blocks"), [(9000, 4, 6), (6000, 4, 4), (4000, 3, 2), (2000, 1, 1)])
def test_blocks_take_what_entries_leave_or_a_quarter(cache, monkeypatch, limit, entries, blocks):
    """Of four entries and six blocks of half their size, the least recently used go."""
    for number in range(4):
        folder.Entry(f"entry{number}").write_by("x", lambda path: path.write_bytes(bytes(1000)))
        os.utime(cache / f"entry{number}", (number, number))
    for number in range(6):
        folder.Entry("blocks").write_by(f"{number}.block", lambda path: path.write_bytes(bytes(500)))
        os.utime(cache / "blocks" / f"{number}.block", (number, number))
    monkeypatch.setenv("RIVER_COMPILE_CACHE_SIZE_GB", str(limit / 1e9))
    folder.evict()
    assert sorted(path.name for path in cache.glob("entry*")) == [f"entry{n}" for n in range(4 - entries, 4)]
    assert sorted(path.stem for path in cache.rglob("*.block")) == [f"{n}" for n in range(6 - blocks, 6)]


def test_the_command_lists_sizes_and_clears(used, capsys):
    assert main(["cache", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {entry["about"].split()[0] for entry in listed["entries"]} == {"programs", "twins"}
    assert sum(entry["bytes"] for entry in listed["entries"]) >= sum(file.stat().st_size for file in files(used))
    assert main(["cache", "--clear"]) == 0
    assert "freed" in capsys.readouterr().out
    assert files(used) == []


def test_the_command_says_that_nothing_could_be_cleared(used, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    assert main(["cache", "--clear"]) == 1
    assert "Read-only file system" in capsys.readouterr().err
