"""C++ kernels for CPUs: compiled once on the machine that runs them, and called as torch operators.

    isa         the instruction sets: what each needs, and which one this machine runs best
    build       sources -> a shared library in the cache folder, complete or not at all
    load        the libraries of this machine, loaded; the operators ``torch.ops.river_native.*``
    sources     the C++: phases (what a kernel is), the kernels, the thread pool that runs phases, and the operators

docs/kernels.md says how a phase is added. Importing this package imports neither torch nor a compiler.
"""
