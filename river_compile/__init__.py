"""River Compile: a TorchDynamo backend for faster generation with Hugging Face decoders.

``accelerate(model)``: 4-bit *twins* of the decoder layers draft and the model's own weights verify; or tokens exit
early to the twins. Importing the package imports neither torch nor Triton: public names load on first use.
"""

import logging as _logging
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any

from river_compile.version import __version__ as __version__

# transformers imports torchao, which logs each extension for other machines that it cannot load, and torch logs that it
# registers enums in an old way: nothing that a user can act on.
for _name in ("torchao", "torch.utils._pytree"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)

# In a bare checkout `passes/` and `kernels/` lie next to this folder; an installed package has them inside.
_here = _os.path.dirname(__file__)
_root = _os.path.dirname(_here)
# Only under its own name: a tool that walks submodules finds this folder again as `river_compile.river_compile`.
_checkout = not _os.path.isdir(_os.path.join(_here, "passes")) and _os.path.isdir(_os.path.join(_root, "passes"))
if _checkout and __name__ == "river_compile":
    __path__.append(_root)

if _TYPE_CHECKING:
    from river_compile.api.accelerate import accelerate as accelerate
    from river_compile.api.accelerate import collect_statistics as collect_statistics
    from river_compile.api.accelerate import empty_cache as empty_cache
    from river_compile.api.accelerate import from_pretrained as from_pretrained
    from river_compile.api.accelerate import restore as restore
    from river_compile.api.export import export as export
    from river_compile.api.mxfp4 import load_mxfp4 as load_mxfp4
    from river_compile.api.twins import requantize as requantize
    from river_compile.api.twins import save_twins as save_twins
    from river_compile.config import RiverConfig as RiverConfig
    from river_compile.decoding.continuous import BatchCounters as BatchCounters
    from river_compile.decoding.continuous import ContinuousBatch as ContinuousBatch
    from river_compile.decoding.mode import Decode as Decode
    from river_compile.decoding.mode import ExactMode as ExactMode
    from river_compile.decoding.mode import decode as decode
    from river_compile.decoding.mode import exact as exact
    from river_compile.errors import RiverError as RiverError
    from river_compile.errors import RiverWarning as RiverWarning
    from river_compile.evaluation.tune import tune_exit as tune_exit
    from river_compile.exit_rule import ExitRule as ExitRule
    from river_compile.reporting.report import Report as Report
    from river_compile.reporting.report import report as report
    from river_compile.reporting.trace import Trace as Trace
    from river_compile.reporting.trace import trace as trace
    from river_compile.runtime.tensor_parallel import tensor_parallel_plan as tensor_parallel_plan

# Public names and their modules. They load on first use. No module may share its name with one of them: importing the
# module would take the name's place.
_EXPORTS = {
    "BatchCounters": "decoding.continuous",
    "ContinuousBatch": "decoding.continuous",
    "Decode": "decoding.mode",
    "ExactMode": "decoding.mode",
    "ExitRule": "exit_rule",
    "Report": "reporting.report",
    "RiverConfig": "config",
    "RiverError": "errors",
    "RiverWarning": "errors",
    "Trace": "reporting.trace",
    "accelerate": "api.accelerate",
    "collect_statistics": "api.accelerate",
    "decode": "decoding.mode",
    "empty_cache": "api.accelerate",
    "exact": "decoding.mode",
    "export": "api.export",
    "from_pretrained": "api.accelerate",
    "load_mxfp4": "api.mxfp4",
    "report": "reporting.report",
    "requantize": "api.twins",
    "restore": "api.accelerate",
    "save_twins": "api.twins",
    "tensor_parallel_plan": "runtime.tensor_parallel",
    "trace": "reporting.trace",
    "tune_exit": "evaluation.tune",
}
__all__ = [*sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
