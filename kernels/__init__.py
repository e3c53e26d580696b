"""Kernels of River Compile: 4-bit quantization, packing, torch operators, generated Triton and C++. They know no graph.

    ops, cache_ops  the `torch.ops.river` operators in plain torch; portable: their parts
    quant       weights -> 4-bit grids or lossless 12 and 8 bits -> the bytes that a kernel reads
    triton      tensors -> spec -> template -> launch, for GPUs;  native: the C++ kernels, for CPUs
Importing this package imports neither torch nor Triton.
"""

MAX_EXACT_ROWS = 16  # that generated kernels multiply, of decoding and verification; a library multiplies more
