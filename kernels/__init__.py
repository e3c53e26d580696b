"""Kernels of River Compile: 4-bit quantization, packing, torch operators and generated Triton. They know no graph."""
