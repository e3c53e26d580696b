"""`make soak`: a few seeded cases of each kind pass, and what is broken on purpose is found, kept and found again."""

import json
import random

import pytest
import torch

from river_compile.runtime.state import on_step
from tools.soak import __main__ as command
from tools.soak import cases, serving, text, threads

CASE = {
    "family": "llama",
    "layers": 2,
    "weights": 0,
    "steps": [
        {"do": "compile", "options": {"threshold": -1.0, "first_exit": 1}},
        {"do": "generate", "seed": 1, "lengths": [3, 5], "cache": "static", "arguments": {"max_new_tokens": 6}},
    ],
}


def test_cases_are_data_and_their_seed_alone_decides():
    for kind in (text, threads, serving):
        for seed in range(20):
            case = kind.draw(random.Random(seed))
            assert json.loads(json.dumps(case)) == case == kind.draw(random.Random(seed))
            assert all(simpler != case for simpler in kind.smaller(case))


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


class Odd:
    """A kind of case that fails where two of its numbers are odd."""

    @staticmethod
    def draw(rng):
        return {"numbers": [2 * rng.randrange(9) + i for i in (1, 0, 1, 0)]}

    @staticmethod
    def run(case, folder):
        if sum(number % 2 for number in case["numbers"]) > 1:
            raise cases.Failure("two are odd")
        return "passed"

    @staticmethod
    def smaller(case):
        for i in range(len(case["numbers"])):
            yield {**case, "numbers": [*case["numbers"][:i], *case["numbers"][i + 1 :]]}


def test_a_failure_is_made_smaller_kept_and_found_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.KINDS, "odd", (Odd, 1.0))
    tally = cases.soak({"odd": (Odd, 1.0)}, seed=0, seconds=0.1, failures=tmp_path)
    kept = tally.failures[0]
    assert "FAILED (Failure)" in str(tally)
    assert len(json.loads(kept.read_text())["numbers"]) == 2
    assert command.main(["--again", str(kept)]) == 1
    assert "two are odd" in capsys.readouterr().out
    kept.write_text(json.dumps({"kind": "odd", "numbers": [1]}))
    assert command.main(["--again", str(kept)]) == 0
    assert not (tmp_path / "running.json").exists()


@pytest.mark.parametrize(("held", "bytes_"), [(1, 0), (0, 30_000)])
def test_a_leak_has_a_slope(held, bytes_, capsys):
    samples = [(at, 10**6 + bytes_ * at, 50 + held * at) for at in range(0, 200, 10)]
    with pytest.raises(cases.Failure, match=r"memory rises by"):
        serving._is_flat(samples)
    serving._is_flat([(at, 10**6, 50) for at, *_ in samples])


@pytest.mark.slow
def test_live_tensors_are_counted():
    kept = [torch.empty(1) for _ in range(10_000)]
    before = serving.live_tensors()
    kept.clear()
    assert before - serving.live_tensors() >= 10_000


def test_the_seed_is_printed_and_a_run_without_failures_succeeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.KINDS, "odd", (Odd, 1.0))
    monkeypatch.setattr(Odd, "run", lambda case, folder: "passed")
    assert command.main(["--minutes", "0.001", "--kinds", "odd", "--seed", "5", "--failures", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\n")
    assert "odd " in said
    assert [path.name for path in tmp_path.iterdir()] == ["tally.txt"]
    assert (tmp_path / "tally.txt").read_text() == said
