"""Takes back everything that this package did to a model: compilation, ``generate``, twins, offloaded weights."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from river_compile.backend import river
from river_compile.offload.weights import bring_back
from river_compile.reporting.plain_runs import PlainRuns
from river_compile.runtime.compiled_call import compiled_call
from river_compile.state import forget, unwrap
from river_compile.upstream.compiled_calls import compiled_with

from .generation import generate_as_ever

Module = TypeVar("Module", bound=nn.Module)


def restore(model: Module) -> Module:
    """Makes a model what it was before ``accelerate`` or ``model.compile(backend="river")``, and frees its twins.

    Offloaded weights come back, bit for bit. What ``torch.compile(model, backend="river")`` returned cannot be taken
    back: such a wrapper compiles again at its next call.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The same object.

    Raises:
        OptionError: (a ``ValueError``) it is no module.
    """
    inner = unwrap(model)
    bring_back(inner)
    generate_as_ever(inner)
    if compiled_with(river, compiled_call(inner)):
        vars(inner).pop("_compiled_call_impl")
    PlainRuns.end(inner)
    forget(inner)
    return model
