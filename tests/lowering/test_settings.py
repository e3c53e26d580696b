"""What of a mode of torch.compile reaches Inductor."""

import functools

import pytest
import torch

from river_compile.backend import river
from river_compile.building import assemble
from river_compile.lowering import inductor
from river_compile.lowering.inductor import inductor_settings
from tests.support.families import make, prompt
from tests.support.lowerings import UNQUANTIZED, UNQUANTIZED_INDUCTOR
from tests.support.recorder import recording


def test_a_whole_graph_has_the_modes_settings():
    assert inductor_settings("reduce-overhead")["triton.cudagraphs"] is True
    assert inductor_settings(None) == {}


def test_inductors_cache_tells_versions_of_the_operators_apart(monkeypatch):
    """Compiled code calls them by their schemas, which its key does not have by itself."""
    tags = []

    def note(graph_module, *_args, **_options):
        tags.append(torch.compiler.config.cache_key_tag)
        return graph_module

    monkeypatch.setattr(inductor, "compile_fx", note)

    def compiled():
        torch._dynamo.reset()
        model = make("llama", layers=2)
        model.compile(backend=river, options={"kernels": UNQUANTIZED_INDUCTOR})
        with torch.no_grad():
            model(prompt())
        return {*tags}

    before = compiled()
    assert len(before) == 1
    library = torch.library.Library("river", "FRAGMENT")
    library.define("of_a_test(Tensor x) -> Tensor")
    try:
        assert len(compiled()) == 2
    finally:
        library._destroy()
    assert compiled() - before != set()
    assert torch.compiler.config.cache_key_tag not in tags


@pytest.mark.parametrize("captures", [False, True])
@recording()
def test_the_backend_asks_for_none_whether_it_captures_or_not(captures, monkeypatch):
    """Prompts and caches that grow run uncaptured."""
    seen, compiler = [], assemble.SegmentCompiler

    def note(*arguments):
        seen.append(arguments[-1])
        return compiler(*arguments)

    monkeypatch.setattr(assemble, "SegmentCompiler", note)
    model = make("llama", layers=2)
    options = {"kernels": UNQUANTIZED, "graphs": captures}
    model.compile(backend=functools.partial(river, options=options, mode="reduce-overhead"))
    ids = prompt()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert len(seen) >= 2
    assert all(settings["triton.cudagraphs"] is False for settings in seen)
