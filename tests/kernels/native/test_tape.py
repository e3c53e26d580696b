"""Tapes: replays on current values, lifetimes, threads, forks, and unsupported calls."""

from __future__ import annotations

import gc
import itertools
import os
import threading

import pytest
import torch
from torch import fx

from river_compile.kernels.native import load
from river_compile.kernels.native.load import Tape
from river_compile.lowering.native import CannotRecord, NativeSegment
from tests.kernels.native.running import dense, linear, native
from tests.kernels.packing import pack_linear
from tests.support.layout import ROOT, run_python

BATCH, HEADS, KV_HEADS, DIM, SLOTS, HIDDEN, WIDE = 2, 4, 2, 16, 300, 64, 192

pytestmark = pytest.mark.usefixtures("restored", "_loaded")


@pytest.fixture
def _loaded():
    load.load()


class Block:
    """A decoder block's calls on tensors that persist between steps."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        self.packed = {
            name: pack_linear(random(n, k) / k**0.5, 32, "native", "rtn")
            for name, n, k in (
                ("qkv", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN), ("o", HIDDEN, HEADS * DIM),
                ("up", 2 * WIDE, HIDDEN), ("down", HIDDEN, WIDE),
            )
        }  # fmt: skip
        self.norm, self.head = random(HIDDEN).bfloat16(), random(40, HIDDEN).bfloat16()
        self.tables = random(BATCH, 1, DIM), random(BATCH, 1, DIM)
        self.hidden = torch.zeros(BATCH, 1, HIDDEN).bfloat16()
        self.caches = tuple(random(BATCH, KV_HEADS, SLOTS, DIM).bfloat16() for _ in range(2))
        self.mask = torch.zeros(BATCH, SLOTS)
        self.counter, self.one = torch.tensor([0]), torch.tensor([1])

    def feed(self, step: int) -> None:
        self.hidden.copy_(torch.randn(self.hidden.shape, generator=torch.Generator().manual_seed(step)))
        self.mask.copy_((torch.arange(SLOTS) > step + 280).float() * torch.finfo(torch.float32).min)

    def linear(self, name: str, x: torch.Tensor, **around) -> torch.Tensor:
        return linear(x, self.packed[name], None, **around)

    def calls(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits, and the slot after this step's."""
        normed = {"norm": "rms", "norm_weight": self.norm}
        qkv = self.linear("qkv", self.hidden, **normed)
        q = native.kv_fill(qkv, None, None, *self.tables, self.counter, *self.caches, "none", 0.0, False)
        attended = native.decode_attention(q, *self.caches, self.mask, 0.25, 0.0)
        hidden = self.linear("o", attended.view(BATCH, 1, -1), residual=self.hidden)
        mlp = self.linear("up", hidden, **normed, activation="silu", gated=True)
        hidden = self.linear("down", mlp, residual=hidden)
        following = native.add(self.counter, self.one)
        native.advance(self.counter, 1)
        return dense(hidden, self.head, **normed), following


def recorded(block: Block) -> tuple[Tape, tuple[torch.Tensor, torch.Tensor]]:
    tape = Tape()
    with tape.recording():
        return tape, block.calls()


def assert_same_step(direct: Block, taped: Block, tape: Tape, outputs, step: int) -> None:
    for block in (direct, taped):
        block.feed(step)
    expected = direct.calls()
    tape.replay()
    for place, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(a, b), f"output {place} of step {step}"
    for a, b in zip((*taped.caches, taped.counter), (*direct.caches, direct.counter), strict=True):
        assert torch.equal(a, b), f"what step {step} wrote"


def test_replays_are_the_calls_on_what_the_inputs_hold_by_then():
    """Hidden states, masks, counters and the number of threads change between steps."""
    direct, taped = Block(), Block()
    tape, outputs = recorded(taped)
    assert taped.counter.item() == 0, "recording runs nothing"
    for step in range(6):
        torch.set_num_threads(step % 3 + 1)
        assert_same_step(direct, taped, tape, outputs, step)
    assert taped.counter.item() == 6
    assert outputs[1].item() == 6


def test_the_last_position_of_each_text_of_a_batch_is_read_where_it_lies():
    block, tape, g = Block(), Tape(), torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, HIDDEN, generator=g).bfloat16()
    with tape.recording():
        logits = dense(hidden[:, -1:], block.head, norm="rms", norm_weight=block.norm)
    hidden.copy_(torch.randn(hidden.shape, generator=g))
    tape.replay()
    last = hidden[:, -1:].contiguous()
    assert torch.equal(logits, dense(last, block.head, norm="rms", norm_weight=block.norm))


def test_counters_move_in_the_order_of_the_calls():
    a, b, tape = torch.tensor([10]), torch.tensor([100]), Tape()
    with tape.recording():
        before = native.add(a, b)
        native.advance(a, 1)
        between = native.add(a, before)
        native.advance(a, 5)
        native.copy(a, b)
    for start_a, start_b in ((10, 100), (16, 16)):
        tape.replay()
        assert before.item() == start_a + start_b
        assert between.item() == start_a + 1 + start_a + start_b
        assert (a.item(), b.item()) == (start_a + 6, start_a + 6)


def test_what_was_made_while_recording_lives_as_long_as_the_tape():
    """New tensors full of NaN would take freed memory."""
    direct, taped = Block(), Block()
    tape, outputs = recorded(taped)
    gc.collect()
    spoiled = [torch.full((n,), float("nan")) for n in (8, 32, 64, 128, 256, 384, 4096) for _ in range(200)]
    assert_same_step(direct, taped, tape, outputs, 0)
    assert all(t.isnan().all() for t in spoiled), "a replay wrote to memory of others"


def test_outputs_outlive_the_tape():
    block = Block()
    tape, (logits, _) = recorded(block)
    tape.replay()
    copy = logits.clone()
    del tape
    gc.collect()
    spoiled = [torch.full((80,), float("nan")).bfloat16() for _ in range(200)]
    assert torch.equal(logits, copy)
    assert len(spoiled) == 200


def test_a_timed_replay_does_the_same_and_tells_what_each_phase_took():
    direct, taped = Block(), Block()
    tape, outputs = recorded(taped)
    assert tape.bytes > BATCH * HIDDEN * 4
    for block in (direct, taped):
        block.feed(3)
    expected = direct.calls()
    torch.set_num_threads(2)
    phases = [dict(zip(load.PHASE_COLUMNS, row, strict=True)) for row in tape.replay_timed().tolist()]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    matmuls = [(p["bits"], p["out_features"], p["in_features"]) for p in phases if p["kind"] == 2]
    assert matmuls == [(4, 128, 64), (4, 64, 64), (4, 384, 64), (4, 64, 192), (16, 40, 64)]
    kinds = [load.PHASE_KINDS[phase["kind"]] for phase in phases]
    product = ["prepare", "matmul"]
    assert kinds == [*product, "kv fill", "attention", "attention", *product * 3, "other", "other", *product]
    assert len(kinds) == tape.phases
    for before, phase in itertools.pairwise(phases):
        assert before["end"] <= phase["begin"] < phase["end"], "a phase begins when the one before it has ended"
    busy = [phase["caller"] + phase["others"] for phase in phases]
    assert all(0 < took <= 2 * (phase["end"] - phase["begin"]) for took, phase in zip(busy, phases, strict=True))


def test_the_number_of_threads_may_change_between_replays_of_many_parts():
    """More and fewer threads than before, than cores and than parts: every part runs once."""
    g = torch.Generator().manual_seed(0)
    packed = pack_linear(torch.randn(4096, 96, generator=g), 32, "native", "rtn")
    x, tape = torch.randn(1, 1, 96, generator=g).bfloat16(), Tape()
    with tape.recording():
        outputs = [linear(x, packed, None) for _ in range(3)]
    torch.set_num_threads(1)
    expected = linear(x, packed, None)
    for threads in (1, 5, 2, 3, 7, 2, 4) * 20:
        torch.set_num_threads(threads)
        for y in outputs:
            y.fill_(torch.nan)
        tape.replay()
        assert all(torch.equal(y, expected) for y in outputs)


def test_recording_again_takes_the_place_of_what_was_there():
    a, tape = torch.tensor([0]), Tape()
    for by in (1, 10):
        with tape.recording():
            native.advance(a, by)
    tape.replay()
    assert (a.item(), tape.phases) == (10, 1)


def test_a_thread_records_one_tape_at_a_time():
    """The rejected tape is unchanged, and the other one still runs."""
    a, other, tape = torch.tensor([0]), Tape(), Tape()
    with other.recording():
        native.advance(a, 100)
    with tape.recording():
        native.advance(a, 1)
        for second in (other, tape):
            with pytest.raises(RuntimeError, match="records a tape already"), second.recording():
                raise AssertionError("not reached")
        native.advance(a, 2)
    tape.replay()
    assert a.item() == 3
    other.replay()
    assert a.item() == 103


def test_other_threads_run_while_one_records():
    a, b, tape = torch.tensor([0]), torch.tensor([0]), Tape()
    with tape.recording():
        native.advance(a, 1)
        thread = threading.Thread(target=lambda: native.advance(b, 1))
        thread.start()
        thread.join()
    assert (a.item(), b.item()) == (0, 1)
    assert tape.phases == 1


def test_an_error_ends_the_recording():
    a, tape = torch.tensor([0]), Tape()
    with pytest.raises(KeyError), tape.recording():
        raise KeyError
    native.advance(a, 1)
    assert a.item() == 1


def test_a_replay_after_two_wrong_ids_is_right():
    """Both are noted, one is reported, and neither is reported again."""
    table, ids, tape = torch.eye(4), [torch.tensor([1]), torch.tensor([2])], Tape()
    with tape.recording():
        rows = [native.embed(each, table) for each in ids]
    for each in ids:
        each.fill_(4)
    with pytest.raises(RuntimeError, match="no row of the embedding"):
        tape.replay()
    for each in ids:
        each.fill_(3)
    tape.replay()
    assert all(torch.equal(row, table[3:]) for row in rows)


def test_an_empty_tape_is_refused():
    for use in (Tape.replay, lambda tape: tape.phases, lambda tape: tape.bytes):
        with pytest.raises(RuntimeError, match="nothing was recorded on this tape"):
            use(Tape())


COPYING = {
    "x": lambda x: dense(x.transpose(0, 1), torch.ones(8, 64)),
    "residual": lambda x: dense(x, torch.ones(8, 64), residual=torch.ones(3, 2, 8).transpose(0, 1)),
    "q": lambda x: native.decode_attention(x[:, :2].mT, *torch.ones(2, 2, 1, 4, 2), None, 1.0, 0.0),
    "a copy's tensors": lambda x: native.copy(x.mT, torch.ones(2, 64, 3)),
}


@pytest.mark.parametrize("name", COPYING)
def test_copies_are_refused_on_a_tape(name):
    """They would hold the values at recording."""
    with Tape().recording(), pytest.raises(RuntimeError, match=f"{name} must be contiguous"):
        COPYING[name](torch.ones(2, 3, 64))


def segment(function) -> NativeSegment:
    """Traces a function; a method becomes a function, as in the graphs of the passes."""
    traced = fx.symbolic_trace(function)
    for node in list(traced.graph.nodes):
        if node.op == "call_method":
            node.op, node.target = "call_function", getattr(torch.Tensor, node.target)
    traced.recompile()
    return NativeSegment(traced)


@pytest.mark.parametrize(
    ("function", "copies"),
    [
        (lambda x, w: dense(x, w).transpose(0, 1).reshape(-1), True),
        (lambda x, w: dense(x, w).transpose(0, 1).contiguous(), True),
        (lambda x, w: torch.flatten(dense(x, w)[:, :2]), True),
        (lambda x, w: dense(x, w)[torch.tensor([0])], True),
        (lambda x, w: dense(x, w).transpose(0, 1)[2:], False),
        (lambda x, w: torch.split(dense(x, w), 3, 1)[1].unsqueeze(0), False),
        (lambda x, w: dense(x, w).contiguous().reshape(2, 2, 3).view(-1), False),
    ],
)
def test_a_view_that_copies_is_refused(function, copies):
    """It would copy the values before the first replay."""
    x, w, tape = torch.randn(2, 8), torch.randn(6, 8), Tape()
    callee = segment(function)
    if copies:
        with tape.recording(), pytest.raises(CannotRecord, match="copies what is computed before it"):
            callee.record([x, w], tape)
        return
    with tape.recording():
        out = callee.record([x, w], tape)
    for _ in range(2):
        x.normal_()
        tape.replay()
        assert torch.equal(out, callee([x, w]))


def test_constants_are_kept_with_the_tape():
    graph, tape = fx.Graph(), Tape()
    constant = graph.call_function(torch.arange, (3, 4))
    graph.output(graph.call_function(native.add.default, (graph.placeholder("counter"), constant)))
    counter = torch.tensor([5])
    with tape.recording():
        out = NativeSegment(fx.GraphModule({}, graph)).record([counter], tape)
    gc.collect()
    spoiled = [torch.full((1,), -1) for _ in range(1000)]
    tape.replay()
    assert out.item() == 8
    assert len(spoiled) == 1000


def test_two_threads_replay_tapes_of_their_own_at_once():
    """The one without helper threads runs alone; both get the bits of direct calls."""
    pairs, wrong = [(Block(seed), Block(seed)) for seed in range(2)], []
    tapes = [recorded(taped) for _, taped in pairs]

    def go(number: int) -> None:
        torch.set_num_threads(2)
        try:
            for step in range(20):
                assert_same_step(*pairs[number], *tapes[number], step)
        except AssertionError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_replays_what_its_parent_recorded():
    torch.set_num_threads(2)
    direct, taped = Block(), Block()
    tape, outputs = recorded(taped)
    assert_same_step(direct, taped, tape, outputs, 0)  # (with threads that the child does not have)
    child = os.fork()
    if child == 0:
        try:
            for step in range(1, 4):
                assert_same_step(direct, taped, tape, outputs, step)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for step in range(1, 4):
        assert_same_step(direct, taped, tape, outputs, step)


@pytest.mark.slow
def test_a_tape_that_lives_to_the_end_of_the_process_makes_no_noise(tmp_path):
    code = """
import torch
from river_compile.kernels.native import load
from river_compile.kernels.native.load import Tape
load.load()
a, tape = torch.tensor([0]), Tape()
with tape.recording():
    torch.ops.river_native.advance(a, 1)
tape.replay()
print(a.item())
"""
    done = run_python(code, tmp_path, ROOT)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
