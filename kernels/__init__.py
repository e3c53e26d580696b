"""Kernels of River Compile: 4-bit quantization, packing, torch operators, generated Triton and C++. They know no graph.

Importing this package imports neither torch nor Triton. The modules, from what a user calls down to what they stand on:

    ops         the `torch.ops.river` operators
    portable    plain torch: one query position, scores of logits
    quant       weights -> 4 bits -> the bytes that a kernel reads
    triton      launch: tensors -> the spec of a kernel -> its launch
                tiles: a spec without a tile -> the nearest shape's of a table, or what a tuning file has
                linear, kv_fill, decode_attention, exit_score: one family each, its spec and cost
                templates: the Triton source of each family
                loader: spec -> source file -> compiled or interpreted kernel
    native      load: C++ sources -> libraries of this processor -> the `torch.ops.river_native` operators
"""
