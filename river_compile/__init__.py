"""River Compile: a TorchDynamo backend for faster generation with Hugging Face decoders.

``torch.compile(model, backend="river")`` rewrites the traced decoder so that a token whose hidden state has settled
leaves the 16-bit backbone early and runs through 4-bit *river twins* of the remaining blocks.

Importing this package imports neither torch nor Triton and prints nothing: every public name loads on first use.
"""

import os as _os

# In a bare checkout `passes/` and `kernels/` lie beside this folder; an installed package has them inside.
_here = _os.path.dirname(__file__)
_root = _os.path.dirname(_here)
if not _os.path.isdir(_os.path.join(_here, "passes")) and _os.path.isdir(_os.path.join(_root, "passes")):
    __path__.append(_root)

__version__ = "0.1.0"
