"""What of a mode of torch.compile reaches Inductor."""

import functools

import pytest
import torch

from river_compile import RiverWarning
from river_compile.backend import river
from river_compile.lowering import inductor
from tests.support.families import make, prompt
from tests.support.lowerings import UNQUANTIZED_INDUCTOR
from tests.support.recorder import recording


@pytest.mark.parametrize(("mode", "expected"), [("reduce-overhead", True), (None, None)])
def test_a_whole_graph_has_the_modes_settings(mode, expected, monkeypatch):
    """A model in float64, which River does not rewrite."""
    seen = []

    def note(graph_module, *_args, config_patches):
        seen.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(inductor, "compile_fx", note)
    model = make("llama", layers=2).double()
    model.compile(backend=functools.partial(river, options={"kernels": "native"}, mode=mode))
    with torch.no_grad(), pytest.warns(RiverWarning, match="its weights are float64"):
        model(prompt())
    assert [settings.get("triton.cudagraphs") for settings in seen] == [expected]


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
    seen = []

    def note(graph_module, *_args, config_patches, **_options):
        seen.append(config_patches)
        return graph_module

    monkeypatch.setattr(inductor, "compile_fx", note)
    model = make("llama", layers=2)
    options = {"kernels": UNQUANTIZED_INDUCTOR, "graphs": captures}
    model.compile(backend=functools.partial(river, options=options, mode="reduce-overhead"))
    ids = prompt()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert len(seen) >= 2
    assert all(settings["triton.cudagraphs"] is False for settings in seen)
