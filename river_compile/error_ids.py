"""Ids of the errors and warnings that reach a user, each with a section in docs/troubleshooting.md.

Ids are stable, and their order is that of the topics. A new one takes the next free number of its topic. Those of
kernels are in kernels/messages.py.
"""

from __future__ import annotations

from river_compile.kernels import messages

_TITLES = {
    # Arguments and options.
    "RC001": "Unknown option",
    "RC002": "Value is not allowed",
    "RC003": "Arguments contradict each other",
    "RC004": "Option does not fit the model, the device or the kernels",
    "RC005": "A package is missing",
    "RC006": "Model cannot be accelerated",
    "RC007": "Calibration data is missing or incomplete",
    "RC008": "Exit rule cannot be read",
    "RC009": "Too few texts for the budget",
    # Models and graphs.
    "RC020": "Graph is not supported (on_unsupported='raise')",
    "RC021": "Graph runs without River",
    "RC022": "Weight holds infinite or NaN values",
    "RC023": "Model has its own generate",
    "RC024": "Untested version of a package",
    "RC025": "Compiled model lacks the requested depth",
    "RC026": "Steps did not run through River",
    # Twins.
    "RC040": "Folder holds no saved twins",
    "RC041": "Saved twins are damaged",
    "RC042": "Saved twins belong to another model or other options",
    "RC043": "Saved twins are of another version",
    "RC044": "Folder cannot be written",
    "RC045": "No current twins to save",
    "RC046": "Twins do not fit the export format",
    "RC047": "Saved twins are of another number of ranks",
    "RC048": "Weights changed after their twins were packed",
    "RC049": "Matrices of a rank stay in 16 bits",
    "RC050": "Packed weights were not stored",
    # Decoding.
    "RC060": "Call is not supported by River's decoding loop",
    "RC061": "Call or model is not supported by exact mode",
    "RC062": "Compiled options rule out exact mode",
    "RC063": "strict=True cannot be guaranteed",
    "RC064": "generate runs without River",
    "RC065": "Static KV cache is full",
    "RC066": "ContinuousBatch is closed or cannot take the call",
    "RC067": "An id is no row of an embedding",
    "RC068": "An assistant or MTP layers do not draft",
    # Memory and speed.
    "RC080": "No room for offloaded weights",
    "RC081": "Offload folder is in memory",
    "RC082": "Decode step was not captured",
    "RC083": "Slow kernels were chosen",
    # Compilers and caches.
    "RC100": "C++ kernels cannot be compiled",
    "RC101": "Some operators run uncompiled",
    "RC102": "Compile cache is not trusted",
    # Several ranks.
    "RC121": "Another rank ended",
    "RC122": "Not supported on several ranks",
}
TITLES = dict(sorted((_TITLES | messages.TITLES).items()))
