"""`make soak`: a few seeded cases of each kind pass, and what is broken on purpose is found, kept and found again."""

import json
import random

import pytest
import torch

from river_compile import trace
from river_compile.compile_cache import codec
from river_compile.runtime.state import on_step
from river_compile.twins import file as twin_file
from tests.support.layout import ROOT, run_python
from tools.soak import __main__ as command
from tools.soak import cases, compilers, damage, forged, kill, memory, serving, stored, text, threads

CASE = {
    "family": "llama",
    "layers": 2,
    "weights": 0,
    "steps": [
        {"do": "compile", "options": {"threshold": -1.0, "first_exit": 1}},
        {"do": "generate", "seed": 1, "lengths": [3, 5], "cache": "static", "arguments": {"max_new_tokens": 6}},
    ],
}


@pytest.mark.parametrize("kind", [damage, kill])
@pytest.mark.parametrize("what", stored.STORED)
def test_files(kind, what, tmp_path):
    """Three damages, and two processes killed while they write, for each of the files that the package keeps."""
    for number in range(3 if kind is damage else 2):
        case = kind.draw(random.Random(number)) | {"what": what}
        folder = tmp_path / str(number)
        folder.mkdir()
        if kind is damage:
            case["file"] = stored.STORED[what].files[0]
        assert kind.run(case, folder) in ("passed", "refused (TwinsError)", "refused (OptionError)")


def test_cases_are_data_and_their_seed_alone_decides():
    for kind in (text, damage, kill, threads, serving, memory, compilers, forged.Programs, forged.Twins):
        for seed in range(20):
            case = kind.draw(random.Random(seed))
            assert json.loads(json.dumps(case)) == case == kind.draw(random.Random(seed))
            assert all(simpler != case for simpler in kind.smaller(case))


@pytest.mark.parametrize("kind", [forged.Programs, forged.Twins])
def test_edited_files_are_refused_or_harmless(kind, tmp_path):
    outcomes = set()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.add(kind.run(kind.draw(random.Random(number)), folder))
    assert outcomes == {"passed", "refused"}


def test_text_of_a_program_that_became_code_is_found(monkeypatch, tmp_path):
    """The name of a keyword; quoted, as an argument's value, it is none."""
    forged.check_code("def forward(self, x):\n    return f(x, 'river_forged()')")
    content = json.loads(stored.program()[0])
    places = [*forged._places(content)]
    keyword = next(
        argument
        for code in content["codes"]
        for node in code["module"]["graph"]
        for argument in (node[3]["dict"] if node[0] == "call_function" else ())
    )
    at = next(i for i, (holder, key) in enumerate(places) if holder is keyword and key == 0)
    value = "x = river_forged, y"
    seed = next(seed for seed in range(1000) if random.Random(seed).choice(forged._VALUES) == value)
    case = {"edits": [{"how": "replace", "at": (at + 0.5) / len(places), "seed": seed}]}
    assert forged.Programs.run(case, tmp_path) == "refused"
    monkeypatch.setattr(codec, "_check_identifiers", lambda *names: None)
    with pytest.raises(cases.Failure, match="text became code"):
        forged.Programs.run(case, tmp_path)


NO_COMPILER = """
from pathlib import Path
import pytest
from torch._inductor.exc import InductorError
from tools.soak import compilers

case = {"compiler": "dies", "family": "llama", "quality": "exact", "seed": 0, "lengths": [3], "kernels": "inductor"}
assert compilers.run(case, Path(sys.argv[1])) == "passed"
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("river_compile.lowering.inductor.working_compiler", lambda: None)
    with pytest.raises(InductorError):
        compilers.run(case, Path(sys.argv[1]))
"""


def test_without_a_compiler_the_text_is_the_plain_models(tmp_path):
    """A backend that does not ask whether anything compiles is found.

    In a separate process: Inductor keeps what a compiler could do, and loaded C++ kernels need no compiler.
    """
    run_python(NO_COMPILER.replace("sys.argv[1]", repr(str(tmp_path))), ROOT, ROOT)


def test_a_text_is_the_plain_models_and_one_through_a_wrong_slot_is_not(tmp_path):
    """A token that left is written one slot too far: text and logits are others, in float64 too."""
    assert text.run(CASE, tmp_path) == "passed"

    def wrong_slot(state, step):
        left = step.decode and step.depth < state.compiled.program.num_blocks
        for value in state.slots if left else ():
            if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[0] == 2:
                value.copy_(value.roll(1, dims=2))

    with on_step(wrong_slot), pytest.raises(text.Differs, match="row 0, token 2: logits are off by"):
        text.run(CASE, tmp_path)


@pytest.mark.parametrize(
    "odd",
    [
        {"ids": "int32"},
        {"stop": ["'", ","]},
        {"dead_end": "greedy"},
        {"dead_end": "sampled"},
        {"do": "hooked sibling"},
    ],
)
def test_calls_that_few_make_are_the_plain_models(odd, tmp_path):
    """In exact mode, in a batch; scores that leave no token to sample raise what they raise there."""
    exact = {
        "do": "exact",
        "arguments": {"max_new_tokens": 6, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"},
    }
    case = {**CASE, "steps": [CASE["steps"][0], {**CASE["steps"][1], **exact, **odd}]}
    assert text.run(case, tmp_path) == ("plain's error" if odd.get("dead_end") == "sampled" else "passed")


@pytest.mark.slow
def test_threads(tmp_path):
    case = threads.draw(random.Random(0))
    steps = [{**CASE["steps"][1], "seed": seed, "lengths": [3]} for seed in range(3)]
    case |= {"family": "llama", "models": 1, "threads": 2, "warm": False, "texts": steps}
    assert threads.run(case, tmp_path) == "passed"


@pytest.mark.slow
def test_clients_of_a_server_get_their_texts_whoever_else_is_there(tmp_path, capsys):
    """One hangs up and one sends nonsense; with as many places as clients none is refused."""
    pytest.importorskip("prometheus_client", reason="the server's packages are not installed")
    asks = {"text": "abc", "settings": {"max_tokens": 6, "temperature": 0}, "bad": {}, "stream": True, "reads": 1}
    others = [{**asks, "end": "leaves"}, {**asks, "end": "bad", "bad": {"top_p": 7}}]
    clients = [[{**asks, "end": "answered"}], *([other] for other in others)]
    case = {"rows": 2, "queue": 8, "quality": "exact", "clients": clients}
    assert serving.run(case, tmp_path) == "passed"
    assert "bytes" in capsys.readouterr().out


def test_a_broken_check_is_found_kept_and_found_again(tmp_path, monkeypatch, capsys):
    """Saved twins whose hash is not checked: a damage goes through, and the file of this failure finds it again."""
    real = twin_file.is_whole
    monkeypatch.setattr(twin_file, "is_whole", lambda file, metadata: True)
    flips = iter(range(100))

    class Flips:
        smaller = staticmethod(damage.smaller)
        run = staticmethod(damage.run)

        @staticmethod
        def draw(rng):
            damages = [{"how": "flip", "at": 0.9, "seed": next(flips)}, {"how": "flip", "at": 0.95, "seed": 1}]
            return {"what": "twins", "file": stored.STORED["twins"].files[0], "damages": damages}

    tally = cases.soak({"damage": (Flips, 1.0)}, seed=0, seconds=0.3, failures=tmp_path)
    kept = tally.failures[0]
    assert str(tally).startswith("damage ")
    assert "FAILED (Failure)" in str(tally)
    assert len(json.loads(kept.read_text())["damages"]) == 1
    assert command.main(["--again", str(kept)]) == 1
    assert "damaged twins were taken for whole" in capsys.readouterr().out
    monkeypatch.setattr(twin_file, "is_whole", real)
    assert command.main(["--again", str(kept)]) == 0
    assert not (tmp_path / "running.json").exists()


def test_a_leak_has_a_slope(monkeypatch):
    kept = []

    def leaks():
        kept.extend(range(3))
        return 10

    monkeypatch.setattr(memory, "live_tensors", lambda: len(kept))
    monkeypatch.setattr(memory, "resident_bytes", lambda: 7)
    assert memory.slopes(leaks, 4000) == pytest.approx((0.0, 0.3), abs=0.01)


@pytest.mark.slow
def test_live_tensors_are_counted():
    kept = [torch.empty(1) for _ in range(10_000)]
    before = memory.live_tensors()
    kept.clear()
    assert before - memory.live_tensors() >= 10_000


def test_memory_generates_through_the_river_and_fails_on_a_slope(monkeypatch, tmp_path, capsys):
    """`make soak` measures slopes over 10^5 tokens; here they are given, after one text."""
    found = []

    def slopes(some_tokens, tokens):
        found.append(some_tokens())
        return next(given)

    monkeypatch.setattr(memory, "slopes", slopes)
    monkeypatch.setattr(memory, "_STEPS", 4)
    case = {"options": {"first_exit": 1}, "do": "generate", "cache": "mine", "tokens": 640, "seed": 0}
    given = iter([(10.0, 0.001), (1000.0, 0.0)])
    with trace() as seen:
        assert memory.run(case, tmp_path) == "passed"
    assert found == [4 * memory._ROWS]
    assert len(seen.steps) == 4
    assert "+0.00100 tensors a token over 640 tokens" in capsys.readouterr().out
    with pytest.raises(cases.Failure, match=r"memory rises by 1000\.0 bytes"):
        memory.run(case, tmp_path)


def test_the_seed_is_printed_and_a_run_without_failures_succeeds(tmp_path, capsys):
    assert command.main(["--minutes", "0.005", "--kinds", "damage", "--seed", "5", "--failures", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\n")
    assert "damage " in said
    assert [path.name for path in tmp_path.iterdir()] == ["tally.txt"]
    assert (tmp_path / "tally.txt").read_text() == said
