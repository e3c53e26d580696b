"""The loss of each twin alone: ``block_errors(model, tokenizer, texts)``, the KL of the final logits per block.

One block after another is replaced by its twin, in a pass over the whole text through the model as it is, not compiled;
the twin's 4-bit matrices are read back from what is packed.

Not handled: how errors of several twins add up (``benchmarks.twins`` measures all of them together), and the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import PreTrainedModel

from river_compile.kernels.portable import token_kl
from river_compile.model_record import ModelRecord, record_of_model, unwrap
from river_compile.twins.observe import Tokenizer, windows_of
from river_compile.twins.packed import PackedMatmul
from river_compile.twins.registry import changed_since
from river_compile.twins.twin_kl import BlockError, BlockErrors
from river_compile.upstream.tensors import as_shard_of, local_of


@torch.no_grad()
def block_errors(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] | None = None,
    *,
    inputs: Iterable[Tensor] | None = None,
    progress: bool = True,
) -> BlockErrors:
    """Replaces one block at a time by its twin and compares the logits.

    Args:
        model: a model that has generated with the backend, so that its twins are packed.
        tokenizer, texts, inputs: the text, as for :func:`river_compile.observe`; other text than was observed.
        progress: whether to show a progress bar.

    Returns:
        The errors of all packed twins; ``report(model)`` shows them too.

    Raises:
        ValueError: no twin is packed, its weights changed since, or there is no text.
    """
    model = unwrap(model)
    windows = windows_of(tokenizer, texts, inputs, "block_errors")
    record = record_of_model(model, "block_errors")
    sites = list(_sites_by_block(record))
    if not sites:
        raise ValueError("no twin of this model is packed; generate a token with another quantizer than 'none' first")
    sums = [[0.0, 0.0] for _ in sites]
    tokens = sum(ids.numel() for ids in windows)
    bar = tqdm(desc="river: measuring twins", unit="pass", total=len(windows) * len(sites), leave=False, delay=1)
    bar.disable = bar.disable or not progress
    with bar, torch.compiler.set_stance("force_eager"):
        for ids in windows:
            reference = _logits(model, {}, ids)
            for total, (_, _, packed) in zip(sums, sites, strict=True):
                logits = _logits(model, _twin_weights(model, packed), ids)
                total[0] += token_kl(reference, logits).sum().item()
                total[1] += (reference.argmax(-1) == logits.argmax(-1)).sum().item()
                bar.update()
    blocks = []
    for (number, path, packed), (kl, agreed) in zip(sites, sums, strict=True):
        worst = min(packed, key=lambda site: site.quality)
        blocks.append(BlockError(number, path, kl / tokens, agreed / tokens, worst.name, worst.quality))
    found = BlockErrors(tuple(blocks), tokens)
    record.block_errors = found
    return found


def _sites_by_block(record: ModelRecord) -> Iterator[tuple[int, str, list[PackedMatmul]]]:
    """Yields number, path and 4-bit matmuls of every block whose twin the latest rewritten graph packed."""
    graph = next((graph for graph in reversed(record.graphs) if graph.twins), None)
    if graph is None:
        return
    for number, path in enumerate(graph.block_paths, start=1):
        packed = [site for site in graph.twins if site.name.startswith(f"{path}.")]
        if packed:
            yield number, path, packed


def _twin_weights(model: nn.Module, packed: Sequence[PackedMatmul]) -> dict[str, Tensor]:
    """Returns the weights of a twin by parameter name, in the model's dtype."""
    named = {id(local_of(parameter)): (name, parameter) for name, parameter in model.named_parameters()}
    weights = {}
    for site in packed:
        sources = site.fresh_sources()
        if sources is None:
            raise ValueError(changed_since(site.name))
        parts = site.dequantize().split(site.linear.out_features)
        for source, part in zip(sources.weights, parts, strict=True):
            part = part.unflatten(0, (site.linear.experts, -1)) if site.linear.experts else part
            name, parameter = named[id(source)]
            weights[name] = as_shard_of((part.mT if site.linear.transposed else part).to(source.dtype), parameter)
    return weights


def _logits(model: nn.Module, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    arguments = {"input_ids": ids.to(next(model.parameters()).device), "use_cache": False}
    return functional_call(model, dict(weights), (), arguments).logits.flatten(0, 1)
