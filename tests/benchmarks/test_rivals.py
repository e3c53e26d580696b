"""The other repairs of missing KV entries do what their methods say: logits and every cache entry, in float32.

References are :mod:`tests.benchmarks.rival_references` for Llama, and for other families the model's own eager forward
with hooks: a hook that returns a block's input as its output is propagation.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache

from benchmarks.rivals.fills import OPTIONS, RIVALS, backend
from benchmarks.rivals.holes import CacheHolesError
from river_compile import OptionError, RiverConfig, report, trace
from river_compile.choices import choose, passes_for
from river_compile.lowering.choose import Lowering
from river_compile.passes.pipeline import run_passes
from river_compile.passes.program import RiverProgram
from river_compile.upstream.transformers import crop
from tests.benchmarks.rival_references import Reference
from tests.passes.graphs import planned, texts
from tests.support.decoding import cache_argument, cache_state, decode, left_padded, new_cache
from tests.support.families import make, prompt

LAYERS = 3
DEPTHS = [2, 3, 1, 0, 2, 1, 3, 3, 0]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def compiled(name, fill, **options):
    model = make(name, layers=LAYERS)
    model.compile(backend=backend(fill), options={**OPTIONS, "lowering": "eager", "first_exit": 1, **options})
    return model


@pytest.mark.parametrize(
    ("fill", "kind", "lowering"),
    [(fill, "static", "eager") for fill in RIVALS]
    + [("propagate", "dynamic", "eager"), ("mask", "dynamic", "eager"), ("recompute", "static", "inductor")],
)
@torch.no_grad()
@pytest.mark.slow
def test_logits_and_entries_are_the_references(fill, kind, lowering):
    """Two rows, the second one padded, nine tokens at mixed depths: what is missing is zero, lengths are plain ones."""
    model = compiled("llama", fill, lowering=lowering)
    cache = new_cache(model, kind)
    logits = decode(model, cache, DEPTHS)
    ids, mask = left_padded(2)
    tokens = prompt(len(DEPTHS), 2, seed=1)
    for row, padding in enumerate((mask == 0).sum(-1).tolist()):
        first = ids.shape[1]
        positions = [*range(padding, first), *(first - padding + i for i in range(len(DEPTHS)))]
        text = [*ids[row, padding:].tolist(), *tokens[row].tolist()]
        reference = Reference(model, fill).run(text, positions, [LAYERS] * (first - padding) + DEPTHS)
        for step, got in enumerate(logits[1:]):
            torch.testing.assert_close(got[row, 0], reference.logits[first - padding + step], **CLOSE)
        for (keys, values, length), expected in zip(cache_state(cache), reference.entries, strict=True):
            assert length == first + len(DEPTHS)
            nothing = torch.zeros_like(keys[row, :, 0])
            for token in range(len(text)):
                for got, entry in zip((keys, values), expected.get(token, (nothing, nothing)), strict=True):
                    torch.testing.assert_close(got[row, :, padding + token], entry, **CLOSE)


@contextlib.contextmanager
def hooked(model, fill, depth, filled, missing):
    """Makes the eager model's next token leave after `depth` blocks.

    Args:
        filled: tokens before it.
        missing: of each block, the tokens whose entries its attention must not read ("mask").
    """

    def hide(block, args, kwargs):
        mask = kwargs["attention_mask"]
        mask = torch.ones(1, 1, 1, filled + 1, dtype=torch.bool) if mask is None else mask.clone()
        mask[..., missing[blocks.index(block)]] = False
        return args, {**kwargs, "attention_mask": mask}

    def skip(_, args, out):
        return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

    blocks = list(model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h)
    handles = [block.register_forward_hook(skip) for block in blocks[depth:]]
    if fill == "mask":
        handles += [block.register_forward_pre_hook(hide, with_kwargs=True) for block in blocks]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("fill", "name", "kind"),
    [
        ("propagate", "gemma3", "static"),
        ("propagate", "falcon", "dynamic"),
        ("mask", "gemma3", "dynamic"),
        ("mask", "mistral", "static"),
    ],
)
@torch.no_grad()
@pytest.mark.slow
def test_other_families_and_sliding_windows(fill, name, kind):
    """More tokens than a sliding window has: what slid out is gone, what was masked stays masked at its new place."""
    model = compiled(name, fill)
    cache, full = new_cache(model, kind), DynamicCache()
    got = decode(model, cache, DEPTHS, batch=1)
    held = {"use_cache": True, cache_argument(model): full}
    model.forward(input_ids=left_padded(1)[0], **held)
    missing = [[] for _ in range(LAYERS)]
    for step, depth in enumerate(DEPTHS):
        filled = full.get_seq_length()
        with hooked(model, fill, depth, filled, missing):
            expected = model.forward(input_ids=prompt(len(DEPTHS), seed=1)[:, step : step + 1], **held)
        torch.testing.assert_close(got[step + 1][0], expected.logits[0], rtol=1e-3, atol=1e-4)
        for gone in missing[depth:]:
            gone.append(filled)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fill", "name", "kind", "words"),
        [
            ("recompute", "llama", "dynamic", 'cache_implementation="static" gives one'),
            ("recompute", "mistral", "static", "filled from the front"),  # the prompt fills the sliding window
        ],
    )
    @torch.no_grad()
    @pytest.mark.slow
    def test_caches_that_a_fill_cannot_write_to_are_named(self, fill, name, kind, words):
        model = compiled(name, fill)
        with pytest.raises(OptionError, match=words) as error:
            decode(model, new_cache(model, kind), [1], batch=1)
        assert "model.layers.0" in str(error.value)

    @torch.no_grad()
    @pytest.mark.slow
    def test_a_cache_with_holes_takes_no_second_prompt_and_no_strangers_tokens(self):
        """One without holes does; nothing is written when a cache is refused."""
        model = compiled("llama", "mask")
        cache = new_cache(model, "static", capacity=32)
        decode(model, cache, [LAYERS], batch=1)
        decode(model, cache, [1], batch=1)
        before = [(keys.clone(), length) for keys, _, length in cache_state(cache)]
        with pytest.raises(CacheHolesError, match="the fill 'mask' takes one prompt"):
            decode(model, cache, [], batch=1)
        crop(cache, 1)
        with pytest.raises(CacheHolesError, match="the fill 'mask' must see every token"):
            model(input_ids=prompt(1), **{cache_argument(model): cache})
        for (keys, length), (now, _, filled) in zip(before, cache_state(cache), strict=True):
            assert torch.equal(keys, now)
            assert filled == length - 1
        cache.reset()
        assert decode(model, cache, [0], batch=1)[-1].isfinite().all()

    @torch.no_grad()
    def test_beam_search_is_refused_where_it_would_read_wrong_entries(self):
        model = compiled("llama", "monotone", exit_depth=1)
        with pytest.raises(CacheHolesError, match="beam search"):
            model.generate(prompt(), max_new_tokens=4, num_beams=2)


@torch.no_grad()
def test_depths_of_a_monotone_sequence_fall_and_are_reported():
    """The steps' records have the depth that really ran, and the report names no packed matrix."""
    model = compiled("llama", "monotone")
    with trace() as seen:
        decode(model, new_cache(model, "static"), [3, 2, 3, 1, 2], batch=1)
    assert [step.depth for step in seen.tokens] == [3, 2, 2, 1, 1]
    assert report(model).packed == ()


@pytest.mark.parametrize("name", RIVALS)
def test_a_pass_leaves_the_program_it_was_given(name):
    seen = [(program := planned(), texts(program))]
    lowering = Lowering("eager", "plain", fuse=False)
    passes = passes_for(choose(program, RiverConfig(first_exit=1), lowering, RIVALS[name]), program.plan)
    result = run_passes(program, passes, lambda record: seen.append((record.after, texts(record.after))))
    assert isinstance(result, RiverProgram)
    for earlier, expected in seen:
        assert texts(earlier) == expected
        for segment in earlier.segments:
            segment.graph.lint()
            assert len(segment.graph.output_node().args[0]) == len(segment.outputs) + segment.has_score
