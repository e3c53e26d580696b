"""Decode steps that run without Dynamo have the bits of those that run through it, and what changes is noticed.

Tiny models with the eager lowering and unquantized twins, whose steps are the plain model's bit by bit.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers.generation import LogitsProcessor, LogitsProcessorList

import river_compile
from river_compile import backend
from river_compile.runtime.shortcut import Shortcut
from river_compile.upstream.hf_cache import cache_argument
from tests.support.decoding import cache_state, left_padded, new_cache
from tests.support.families import CONFIGS, HIDDEN, make, prompt

OPTIONS = {"lowering": "eager", "quantizer": "none", "exit_depth": 1}
LAYERS = 2
NEW_TOKENS = 10
DECODE_STEPS = NEW_TOKENS - 1
NOTED = 2  # the step that is seen first, and the one that is noted


def compiled(name: str = "llama", **options) -> nn.Module:
    model = make(name, layers=LAYERS)
    model.compile(backend=river_compile.river, options={**OPTIONS, **options})
    return model


def shortcut_of(model) -> Shortcut:
    return model._compiled_call_impl.river_shortcut


def generate(model, ids, mask, kind="static", **options):
    """Returns the ids, every step's scores, and the cache's state."""
    cache = new_cache(model, kind, capacity=64)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **options}
    wanted = {"return_dict_in_generate": True, "output_scores": True, cache_argument(model): cache}
    out = model.generate(ids, attention_mask=mask, **wanted, **options)
    return [out.sequences, *out.scores, *(torch.as_tensor(part) for state in cache_state(cache) for part in state)]


@pytest.mark.parametrize(("name", "kind"), [("llama", "static"), ("llama", "dynamic"), ("gpt2", "static")])
def test_text_scores_and_entries_are_those_through_dynamo(name, kind):
    """With left padding; a second sequence needs one step less to be noted. Caches that grow never leave Dynamo."""
    model, (ids, mask) = compiled(name), left_padded(batch=3)
    sequences = [generate(model, ids, mask, kind) for _ in range(2)]
    shortcut = shortcut_of(model)
    model._compiled_call_impl = model._compiled_call_impl.__wrapped__
    through_dynamo = generate(model, ids, mask, kind)
    for sequence in sequences:
        assert all(map(torch.equal, sequence, through_dynamo))
    assert shortcut.taken == (2 * (DECODE_STEPS - NOTED) + 1 if kind == "static" else 0)


@pytest.mark.parametrize("window", [6, 12, 64])
@pytest.mark.slow
def test_sliding_windows_leave_dynamo_but_where_they_fill_up(window):
    """Full from the prompt on, filling up on the way, never full; they count on as Dynamo's code leaves them."""
    config = CONFIGS["gemma3"](LAYERS)
    config.sliding_window = window
    model = make("gemma3", layers=LAYERS, config=config)
    model.compile(backend=river_compile.river, options=OPTIONS)
    ids, mask = left_padded(batch=3)
    sequences = [generate(model, ids, mask) for _ in range(2)]
    shortcut = shortcut_of(model)
    model._compiled_call_impl = model._compiled_call_impl.__wrapped__
    through_dynamo = generate(model, ids, mask)
    for sequence in sequences:
        assert all(map(torch.equal, sequence, through_dynamo))
    assert shortcut.taken > DECODE_STEPS - 2 * NOTED - (window == 12)


class Adapter(nn.Module):
    """A linear layer with a scaled low-rank one beside it, the scale in a dict as PEFT has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scaling = base, {"default": 1.0}
        self.low_rank = nn.Linear(HIDDEN, base.out_features, bias=False)
        with torch.no_grad():
            self.low_rank.weight.copy_(base.weight).mul_(0.5)

    def forward(self, x):
        return self.base(x) + self.scaling["default"] * self.low_rank(x)


def _scaled_weight(model):
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def _other_data(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = 1.5 * weight.data


def _other_parameter(model):
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(1.5 * up.weight)


def _hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)


def _hook_of_the_model(model):
    def scaled(module, args, output):
        output.logits = 1.5 * output.logits
        return output

    model.register_forward_hook(scaled)


def _adapter(model):
    attention = model.model.layers[0].self_attn
    attention.k_proj = Adapter(attention.k_proj)


def _scale_of_adapter(model):
    model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.25


def _training_mode(model):
    model.train()


def _configuration(model):
    model.config._attn_implementation = "eager"


def _other_dtype(model):
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight.data = norm.weight.data.half()


# In this order: no step of a model with hooks of its own is noted.
CHANGES = [
    _scaled_weight,
    _other_data,
    _other_parameter,
    _training_mode,
    _hook,
    _adapter,
    _configuration,
    _other_dtype,
    _hook_of_the_model,
]


class ChangesModel(LogitsProcessor):
    """Makes a change after every fifth step; notes how many steps took the shortcut between two of them."""

    def __init__(self, model, changes):
        self.model, self.changes, self.steps, self.taken = model, list(changes), 0, []

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps % 5 == 0 and self.changes:
            shortcut = getattr(self.model._compiled_call_impl, "river_shortcut", None)
            self.taken.append(0 if shortcut is None else shortcut.taken)
            self.changes.pop(0)(self.model)
        return scores


def changed_while_it_generates(changes) -> tuple[list[torch.Tensor], list[int]]:
    """Returns what a sequence becomes in which changes are made, and how many steps took the shortcut before each."""
    model, ids = make("llama", layers=LAYERS), prompt()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    model.compile(backend=river_compile.river, options={**OPTIONS, "exit_depth": LAYERS})
    changing = ChangesModel(model, changes)
    processors = LogitsProcessorList([changing])
    new_tokens = 5 * len(changes) + 4
    text = generate(model, ids, torch.ones_like(ids), logits_processor=processors, max_new_tokens=new_tokens)
    return text, changing.taken


@pytest.mark.parametrize("changes", [CHANGES, [_scale_of_adapter]], ids=["many", "scale"])
def test_what_a_logits_processor_changes_takes_effect_in_the_next_step(changes, monkeypatch):
    """The scores of all steps, before and after each change, have the bits that they have through Dynamo."""
    ours, taken = changed_while_it_generates(changes)
    assert all(before < after for before, after in itertools.pairwise([0, *taken]))
    monkeypatch.setattr(backend, "install", lambda model, missed: None)
    through_dynamo, taken = changed_while_it_generates(changes)
    assert not any(taken)
    assert all(map(torch.equal, ours, through_dynamo))


@torch.no_grad()
def test_a_prompt_and_a_stance_go_through_dynamo():
    """A step repeats what the same cache brought before; a prompt ends that, and so does a stance for its steps."""
    model, (ids, mask) = compiled(), left_padded(batch=1)
    generate(model, ids, mask)
    shortcut = shortcut_of(model)
    taken = shortcut.taken
    cache = new_cache(model, "static")
    held = {"use_cache": True, cache_argument(model): cache}
    model(ids, **held)
    step = {"input_ids": ids[:, :1], **held}
    counts = []
    for _ in range(4):
        model(**step)
        counts.append(shortcut.taken - taken)
    assert counts == [0, 0, 1, 2]
    with torch.compiler.set_stance("force_eager"), pytest.warns(river_compile.RiverWarning, match="without the river"):
        model(**step)
    assert shortcut.taken - taken == 2
    model(ids, **held)
    model(**step)
    assert shortcut.taken - taken == 2


@pytest.mark.slow
def test_exact_mode_drafts_and_verifies_by_it():
    model, ids = compiled(exit_depth=None), prompt()
    options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    mode = river_compile.exact.with_options(prompt_lookup=False, max_draft=3, stop_below=0.0)
    with river_compile.trace() as trace:
        exact = model.generate(ids, custom_generate=mode, **options)
    drafts = sum(len(cycle.drafted) for cycle in trace.cycles)
    assert shortcut_of(model).taken > drafts - NOTED
    model._compiled_call_impl = model._compiled_call_impl.__wrapped__
    assert torch.equal(exact, model.generate(ids, custom_generate=mode, **options))


def test_threads_have_steps_of_their_own():
    model, texts = compiled(), {}
    inputs = [left_padded(batch) for batch in (1, 2)]
    alone = [generate(model, *given) for given in inputs]
    threads = [
        threading.Thread(target=lambda i=i: texts.update({i: [generate(model, *inputs[i]) for _ in range(2)]}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert all(all(map(torch.equal, text, expected)) for text in texts[i])


@pytest.mark.slow
def test_nothing_of_a_sequence_or_a_model_stays_alive():
    model, (ids, mask) = compiled(), left_padded(batch=1)
    cache = new_cache(model, "static")
    held = {cache_argument(model): cache, "max_new_tokens": NEW_TOKENS, "disable_compile": True, "do_sample": False}
    model.generate(ids, attention_mask=mask, **held)
    assert shortcut_of(model).taken > 0
    keys, parts = weakref.ref(cache.layers[0].keys), [weakref.ref(model), weakref.ref(shortcut_of(model))]
    del cache, held
    gc.collect()
    assert keys() is None
    del model
    gc.collect()
    assert [part() for part in parts] == [None, None]
