"""`benchmarks.twins`: the loss of one block's twin alone."""

import pytest
import torch

from benchmarks.twins import block_errors
from river_compile import report
from tests.support.families import make, prompt
from tests.support.traced import TracedStep, dequantized


def graph_of(step):
    """Returns the graph of a traced step, with its twins."""
    step.run(quantizer="rtn")
    return report(step.model).graphs[-1]


def test_each_block_alone_against_a_reference():
    """KL with one block's weights replaced by hand; nothing of the model is changed afterwards."""
    step = TracedStep()
    graph = graph_of(step)
    before = {name: p.clone() for name, p in step.model.state_dict().items()}
    ids = [prompt(30, 2, seed=20), prompt(15, seed=21)]
    errors = block_errors(step.model, graph, ids)
    assert [error["block"] for error in errors] == [1, 2]
    assert all(torch.equal(before[name], p) for name, p in step.model.state_dict().items())
    for error in errors:
        inside = [site for site in graph.twins if site.name.startswith(f"model.layers.{error['block'] - 1}.")]
        other = make("llama", layers=2)
        other.load_state_dict(dequantized(other, inside), strict=False)
        total = 0.0
        with torch.no_grad():
            for row in ids:
                p, q = (m(input_ids=row).logits.double().log_softmax(-1) for m in (step.model, other))
                total += (p.exp() * (p - q)).sum().item()
        assert error["KL"] == pytest.approx(total / 75, rel=1e-3)
        assert error["KL"] > 0
        assert (error["SQNR least"], error["of"]) == min((site.sqnr, site.name) for site in inside)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_transposed_matrices_and_experts_count(family):
    step = TracedStep(family)
    assert all(0 < error["KL"] < 1 for error in block_errors(step.model, graph_of(step), [prompt(20)]))
