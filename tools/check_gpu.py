"""Checks that torch sees a GPU (CUDA or ROCm); prints its name, or what to do without one, with exit status 1."""

import sys

import torch

if not torch.cuda.is_available():
    sys.exit(
        f"error: torch {torch.__version__} sees no GPU here. What can be said without one:\n"
        "  python -m benchmarks.decode --random llama-3.2-1b llama-3.1-8b --estimate"
    )
print(torch.cuda.get_device_name())
