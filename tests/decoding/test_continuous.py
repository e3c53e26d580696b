"""Calls that join a running batch have the texts that they have alone, and end without the others' noticing.

Float32 and tiny models, so texts are compared token for token. Rows come and go in an order that the calls' lengths
make: prompts longer and shorter than the batch, texts that end first, in the middle and last.
"""

import gc
import threading
import weakref
from concurrent.futures import CancelledError

import pytest
import torch
from transformers import pipeline
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile.errors import OptionError
from tests.support.decoding import rows_of_steps
from tests.support.families import make
from tests.support.tokenizers import byte_tokenizer

OPTIONS = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
TWINS = {"group_size": 32, "quantizer": "rtn"}
CALLS = ((5, 30), (140, 8), (3, 4), (12, 50), (20, 1), (7, 17), (260, 6))  # tokens of the prompt, new ones
ROWS = 3
WAIT = 600  # seconds, for a result that a busy machine compiles first; no test waits so long where nothing is wrong


@pytest.fixture(scope="module")
def exact():
    model = make("llama", torch.float32, layers=2)
    return river_compile.accelerate(model, quality="exact", **OPTIONS, **TWINS)


@pytest.fixture(scope="module")
def windows():
    """A model whose prompts and texts are longer than its sliding windows, every second block's."""
    model = make("gemma3", torch.float32, layers=2)
    return river_compile.accelerate(model, quality="exact", **OPTIONS, **TWINS)


@pytest.fixture(scope="module")
def never():
    """A model that decodes without drafts, and that no token leaves early."""
    model = make("llama", torch.float32, layers=2)
    return river_compile.accelerate(model, quality="fast", threshold=1.0, **TWINS)


def ids_of(tokens, seed=0):
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(seed + tokens))


def call_of(model, tokens, new, **options):
    ids = ids_of(tokens)
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False, **options}
    return lambda: model.generate(ids, max_new_tokens=new, min_new_tokens=min(new, 3), **given)


@pytest.mark.parametrize("kind", ["exact", "never", "windows"])
def test_texts_are_those_of_calls_alone(kind, request):
    model = request.getfixturevalue(kind)
    calls = [call_of(model, *sizes) for sizes in CALLS]
    expected = [call().tolist() for call in calls]
    with (
        river_compile.ContinuousBatch(model, max_num_seqs=ROWS) as batch,
        river_compile.trace() as trace,
        rows_of_steps() as seen,
    ):
        futures = [batch.submit(call) for call in calls]
        assert [future.result(WAIT).tolist() for future in futures] == expected
        counters = batch.counters
    assert seen == {1, 2, 3}
    assert bool(trace.cycles) == (kind != "never"), "a row that is alone drafts"
    assert counters.calls == len(calls)
    assert counters.tokens == sum(len(text[0]) - size for text, (size, _) in zip(expected, CALLS, strict=True))
    assert counters.prompt_tokens == sum(size for size, _ in CALLS)
    assert len(counters.first_token_seconds) == len(calls)
    assert (counters.rows_in_use, counters.queued) == (0, 0)


def test_prompts_that_begin_with_a_kept_text_run_only_what_is_new(exact):
    """In pieces or as a whole, after one another in the batch."""
    system, sizes = ids_of(200), (30, 300, 17)
    prompts = [torch.cat([system, ids_of(size, seed=7)], dim=1) for size in sizes]
    calls = [
        lambda ids=ids: exact.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=0)
        for ids in prompts
    ]
    expected = []
    for call in calls:
        river_compile.empty_cache(exact)
        expected.append(call().tolist())
    river_compile.empty_cache(exact)
    with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
        futures = [batch.submit(call) for call in calls]
        assert [future.result(WAIT).tolist() for future in futures] == expected
        assert batch.counters.prompt_tokens_kept == 2 * 200


def test_calls_from_threads_share_the_batch(exact):
    expected = [call_of(exact, tokens, 20)().tolist() for tokens in (4, 5, 6, 7)]
    with river_compile.ContinuousBatch(exact, max_num_seqs=4) as batch:
        texts = {}

        def ask(tokens):
            ids = ids_of(tokens)
            texts[tokens] = batch.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=3, pad_token_id=0
            ).tolist()

        threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in (4, 5, 6, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [texts[tokens] for tokens in (4, 5, 6, 7)] == expected


@pytest.mark.parametrize("kind", ["exact", "never"])
def test_sampled_texts_follow_from_the_seed_of_their_call(kind, request):
    model = request.getfixturevalue(kind)
    calls = [call_of(model, tokens, 15, do_sample=True, temperature=0.9, top_k=20) for tokens in (4, 30, 9)]
    expected = []
    for seed, call in enumerate(calls):
        torch.manual_seed(seed)
        expected.append(call().tolist())
    with river_compile.ContinuousBatch(model, max_num_seqs=ROWS) as batch:
        futures = [batch.submit(call, seed) for seed, call in enumerate(calls)]
        assert [future.result(WAIT).tolist() for future in futures] == expected
        torch.manual_seed(1)
        assert batch.submit(calls[1]).result(WAIT).tolist() == expected[1]
        torch.manual_seed(0)
        unseeded = [batch.submit(calls[0]) for _ in range(2)]
        assert unseeded[0].result(WAIT).tolist() != unseeded[1].result(WAIT).tolist()


def test_a_seeded_call_disturbs_none_that_runs_by_itself(exact):
    """One that cannot join draws from PyTorch's generator; another is submitted in the midst of it."""
    batch, other, futures = river_compile.ContinuousBatch(exact, max_num_seqs=ROWS), call_of(exact, 5, 3), []

    def submits(ids, scores):
        if ids.shape[1] == 9:
            thread = threading.Thread(target=lambda: futures.append(batch.submit(other, 5)))
            thread.start()
            thread.join()
        return scores

    sampled = {"do_sample": True, "strict": True}  # (strict texts do not join)
    torch.manual_seed(3)
    expected = call_of(exact, 6, 9, **sampled)().tolist()
    with batch:
        found = batch.submit(call_of(exact, 6, 9, logits_processor=LogitsProcessorList([submits]), **sampled), 3)
        assert found.result(WAIT).tolist() == expected
        assert len(futures) == 1
        assert futures[0].result(WAIT).shape[1] == 8


class Raises(BaseStreamer):
    """Raises when so many tokens have come."""

    def __init__(self, after):
        self.left, self.ended = after, False

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the client has gone")

    def end(self):
        self.ended = True


class RaisesToo(LogitsProcessor):
    def __call__(self, ids, scores):
        if ids.shape[1] > 8:
            raise ZeroDivisionError("a processor of the user's")
        return scores


@pytest.mark.parametrize("kind", ["exact", "never"])
def test_an_error_ends_its_call_alone(kind, request):
    model = request.getfixturevalue(kind)
    fine = call_of(model, 6, 40)
    expected = fine().tolist()
    with river_compile.ContinuousBatch(model, max_num_seqs=ROWS) as batch:
        left = batch.submit(call_of(model, 5, 40, streamer=Raises(4)))
        goes_on = batch.submit(fine)
        wrong = batch.submit(call_of(model, 4, 40, logits_processor=LogitsProcessorList([RaisesToo()])))
        refused = batch.submit(call_of(model, 4, 40, temperature=-1.0, do_sample=True))
        with pytest.raises(ConnectionError, match="gone"):
            left.result(WAIT)
        with pytest.raises(ZeroDivisionError, match="user's"):
            wrong.result(WAIT)
        with pytest.raises(ValueError, match="temperature"):
            refused.result(WAIT)
        assert goes_on.result(WAIT).tolist() == expected
        assert batch.alive


class Tells(BaseStreamer):
    """Tells when the first token has come, and waits then until it may continue."""

    def __init__(self):
        self.came, self.go_on, self.puts = threading.Event(), threading.Event(), 0

    def put(self, value):
        self.puts += 1
        if self.puts == 2:
            self.came.set()
            assert self.go_on.wait(WAIT)

    def end(self):
        pass


def test_calls_are_cancelled_where_they_wait_and_where_they_run(exact):
    streamer = Tells()
    with river_compile.ContinuousBatch(exact, max_num_seqs=1) as batch:
        running = batch.submit(call_of(exact, 5, 400, streamer=streamer))
        waiting = batch.submit(call_of(exact, 6, 10))
        assert streamer.came.wait(WAIT)
        assert batch.counters.queued == 1
        batch.cancel(waiting)
        batch.cancel(running)
        streamer.go_on.set()
        with pytest.raises(CancelledError):
            running.result(WAIT)
        assert waiting.cancelled()
        assert batch.submit(call_of(exact, 5, 3)).result(WAIT).shape[1] == 8


def test_a_call_is_cancelled_on_its_way_into_the_batch(exact):
    submitted = threading.Event()
    with river_compile.ContinuousBatch(exact, max_num_seqs=1) as batch:

        def cancelled_before_it_joins():
            assert submitted.wait(WAIT)
            batch.cancel(future)
            return call_of(exact, 5, 400)()

        future = batch.submit(cancelled_before_it_joins)
        submitted.set()
        with pytest.raises(CancelledError):
            future.result(WAIT)
        assert batch.submit(call_of(exact, 5, 3)).result(WAIT).shape[1] == 8


@pytest.mark.slow
def test_a_change_of_the_model_takes_effect_when_the_batch_is_empty(exact):
    """One that PyTorch does not count, of an attribute that passes have as a constant."""
    call, norm = call_of(exact, 5, 12), exact.model.layers[1].input_layernorm
    with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
        texts = [batch.submit(call).result(WAIT).tolist()]
        before, norm.variance_epsilon = norm.variance_epsilon, 50.0
        try:
            texts += [future.result(WAIT).tolist() for future in [batch.submit(call) for _ in range(2)]]
            expected = call().tolist()
        finally:
            norm.variance_epsilon = before
        texts.append(batch.submit(call).result(WAIT).tolist())
    assert texts == [texts[0], expected, expected, texts[0]]
    assert texts[0] != expected


def test_calls_that_cannot_join_run_by_themselves(exact):
    pair = ids_of(6).expand(2, -1)
    calls = [
        lambda: exact.generate(pair, attention_mask=torch.ones_like(pair), max_new_tokens=5, pad_token_id=0),
        call_of(exact, 5, 5, num_beams=2),
        call_of(exact, 5, 5, strict=True),
        call_of(exact, 5, 9),
    ]
    expected = [call().tolist() for call in calls]
    with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
        futures = [batch.submit(call) for call in (calls[-1], *calls)]
        assert [future.result(WAIT).tolist() for future in futures] == [expected[-1], *expected]
        assert batch.counters.calls == 5


def test_closing_ends_what_runs_and_what_waits(exact):
    streamer = Tells()
    batch = river_compile.ContinuousBatch(exact, max_num_seqs=1)
    futures = [batch.submit(call_of(exact, 5, 400, streamer=streamer)), batch.submit(call_of(exact, 6, 10))]
    assert streamer.came.wait(WAIT)
    closing = threading.Thread(target=batch.close)
    closing.start()
    streamer.go_on.set()
    closing.join()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(WAIT)
    assert not batch.alive
    with pytest.raises(RuntimeError, match="closed"):
        batch.submit(call_of(exact, 5, 3))


def test_bad_arguments_are_named(exact):
    with pytest.raises(OptionError, match="max_num_seqs=0"):
        river_compile.ContinuousBatch(exact, max_num_seqs=0)
    with river_compile.ContinuousBatch(exact), pytest.raises(OptionError, match="Close that one first"):
        river_compile.ContinuousBatch(exact)
    with pytest.raises(OptionError, match="max_num_seqs=1000000 is not allowed; it must be an integer from 1 to 4096"):
        river_compile.ContinuousBatch(exact, max_num_seqs=1_000_000)
    for wrong in (3, make("llama", layers=2)):
        with pytest.raises(OptionError, match=r"a torch.nn.Module|accelerated model"):
            river_compile.ContinuousBatch(wrong)


class TestSubmittedFunctions:
    """They get what generate returns, and may do with it what they like."""

    def test_return_anything(self, exact):
        call, expected = call_of(exact, 5, 9), call_of(exact, 5, 9)()[0].tolist()
        with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
            goes_on = batch.submit(call_of(exact, 6, 40))
            assert batch.submit(lambda: call()[0].tolist()).result(WAIT) == expected
            assert batch.submit(lambda: "no call at all").result(WAIT) == "no call at all"
            with pytest.raises(AttributeError, match="no_such"):
                batch.submit(lambda: call().no_such).result(WAIT)
            assert goes_on.result(WAIT).shape[1] == 46

    def test_may_be_a_pipeline(self, exact):
        generator = pipeline("text-generation", model=exact, tokenizer=byte_tokenizer(), device="cpu")
        expected = generator("abc", max_new_tokens=8, do_sample=False)
        with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
            futures = [batch.submit(lambda: generator("abc", max_new_tokens=8, do_sample=False)) for _ in range(2)]
            assert [future.result(WAIT) for future in futures] == [expected, expected]

    def test_may_call_generate_twice(self, exact):
        calls = call_of(exact, 5, 9), call_of(exact, 7, 6)
        expected = [call().tolist() for call in calls]
        with river_compile.ContinuousBatch(exact, max_num_seqs=1) as batch:
            assert batch.submit(lambda: [call().tolist() for call in calls]).result(WAIT) == expected

    def test_may_use_the_batch(self, exact):
        ids = ids_of(5)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "pad_token_id": 0}
        expected = exact.generate(ids, **given).tolist()
        with river_compile.ContinuousBatch(exact, max_num_seqs=1) as batch:
            assert batch.submit(lambda: batch.generate(ids, **given).tolist()).result(WAIT) == expected
            batch.submit(batch.close).result(WAIT)
        assert not batch.alive

    def test_interrupts_end_their_call_alone(self, exact):
        class Interrupts(Raises):
            def put(self, value):
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1

        with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
            interrupted = batch.submit(call_of(exact, 5, 40, streamer=Interrupts(3)))
            goes_on = batch.submit(call_of(exact, 6, 40))
            with pytest.raises(KeyboardInterrupt):
                interrupted.result(WAIT)
            assert goes_on.result(WAIT).shape[1] == 46
            assert batch.alive

    def test_processors_that_generate_are_errors(self, exact):
        """They run in the batch's thread, which would wait for itself."""

        class Generates(LogitsProcessor):
            def __call__(self, ids, scores):
                call_of(exact, 3, 3)()
                return scores

        with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
            future = batch.submit(call_of(exact, 5, 9, logits_processor=LogitsProcessorList([Generates()])))
            with pytest.raises(RuntimeError, match="cannot call the model's generate"):
                future.result(WAIT)

    def test_leave_pytorchs_generator_alone(self, exact):
        before = torch.get_rng_state()
        with river_compile.ContinuousBatch(exact, max_num_seqs=ROWS) as batch:
            for options in ({}, {"strict": True}):  # as a row, and alone
                batch.submit(call_of(exact, 5, 9, do_sample=True, **options), seed=3).result(WAIT)
        assert torch.equal(torch.get_rng_state(), before)


def _ended():
    """Waits for the threads of dropped batches."""
    gc.collect()
    for thread in [each for each in threading.enumerate() if each.name == "river continuous batch"]:
        thread.join(WAIT)
        assert not thread.is_alive()


def test_a_batch_that_is_dropped_ends_its_threads_and_frees_the_model():
    model = river_compile.accelerate(make("llama", torch.float32, layers=2), **OPTIONS, **TWINS)
    batch = river_compile.ContinuousBatch(model)
    assert batch.submit(call_of(model, 5, 3)).result(WAIT).shape[1] == 8
    gone = weakref.ref(model)
    del batch
    _ended()
    assert river_compile.ContinuousBatch(model).alive  # another one may take its place
    _ended()
    del model
    gc.collect()
    assert gone() is None
