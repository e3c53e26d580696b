"""The pass for strict verification replaces what depends on the width of a pass, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from river_compile.passes.normalize import normalized
from river_compile.passes.swap_ops import keep_rows


class Block(torch.nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.proj = torch.nn.Parameter(torch.randn(16, 16))
        self.bias = torch.nn.Parameter(torch.randn(16))
        self.causal = causal

    def forward(self, x, q, k, v, mask):
        h = F.linear(F.rms_norm(x, (16,)), self.proj, bias=self.bias)
        if self.causal:
            return h, F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


class Recorder(fx.Interpreter):
    def run_node(self, node: fx.Node) -> object:
        node.meta["example_value"] = super().run_node(node)
        return node.meta["example_value"]


def traced(causal: bool) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Returns a block's graph, with example values on its nodes as Dynamo leaves them, and its inputs."""
    inputs = [torch.randn(2, 3, 16), torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 4 if causal else 2, 5, 8)]
    inputs.append(torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2))
    graph_module = fx.symbolic_trace(Block(causal))
    Recorder(graph_module).run(*inputs)
    return normalized(graph_module), inputs


@pytest.mark.parametrize("causal", [False, True])
def test_linears_and_masked_attention_are_replaced_and_the_function_stays(causal):
    """Causal attention, which only a prompt has, is left alone; keyword arguments reach the operators."""
    graph_module, inputs = traced(causal)
    expected = graph_module(*inputs)
    keep_rows(graph_module.graph, grown=False)
    graph_module.graph.lint()
    graph_module.recompile()
    targets = [node.target for node in graph_module.graph.nodes]
    assert targets.count(torch.ops.river.batch_invariant_linear.default) == 1
    assert targets.count(torch.ops.river.batch_invariant_attention.default) == (0 if causal else 1)
    for ours, plain in zip(graph_module(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
