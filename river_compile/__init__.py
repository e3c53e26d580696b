"""River Compile: a TorchDynamo backend for faster generation with Hugging Face decoders.

``torch.compile(model, backend="river")`` rewrites the traced decoder so that a token whose hidden state has settled
leaves the 16-bit backbone early and runs through 4-bit *river twins* of the remaining blocks.

Importing this package imports neither torch nor Triton and prints nothing: every public name loads on first use.
"""

import logging as _logging
import os as _os

# transformers imports torchao where it is installed, as here. It logs each extension for other machines that it cannot
# load, and torch that it registers enums in an old way: nothing that a user of a model can act on.
for _name in ("torchao", "torch.utils._pytree"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)

# In a bare checkout `passes/` and `kernels/` lie beside this folder; an installed package has them inside.
_here = _os.path.dirname(__file__)
_root = _os.path.dirname(_here)
# Only under its own name: a tool that walks submodules finds this folder again as `river_compile.river_compile`.
_checkout = not _os.path.isdir(_os.path.join(_here, "passes")) and _os.path.isdir(_os.path.join(_root, "passes"))
if _checkout and __name__ == "river_compile":
    __path__.append(_root)

__version__ = "0.1.0"

# Public names and where they live. They load on first use. No module may share its name with one of them: importing
# the module would put it in the name's place.
_EXPORTS = {
    "ArtifactError": "errors",
    "BudgetError": "errors",
    "CacheFullError": "errors",
    "Calibration": "calibration.result",
    "ContinuousBatch": "decoding.continuous",
    "DecodeError": "errors",
    "ExactModeError": "errors",
    "OptionError": "errors",
    "RankError": "errors",
    "Report": "reporting.report",
    "RiverConfig": "config",
    "RiverWarning": "errors",
    "Trace": "reporting.trace",
    "UnsupportedGraphError": "errors",
    "accelerate": "api.accelerate",
    "calibrate": "calibration.calibrate",
    "decode": "decoding.mode",
    "exact": "decoding.mode",
    "export": "api.export",
    "forced_depth": "exits",
    "forced_threshold": "exits",
    "free_cache": "api.accelerate",
    "load": "api.accelerate",
    "observe": "api.twins",
    "refresh": "api.twins",
    "report": "reporting.report",
    "restore": "api.accelerate",
    "river": "backend",
    "save": "api.twins",
    "tensor_parallel_plan": "runtime.tensor_parallel",
    "trace": "reporting.trace",
}
__all__ = [*sorted(_EXPORTS)]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
