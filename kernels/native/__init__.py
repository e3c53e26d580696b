"""C++ kernels for CPUs, compiled once on the machine that runs them and called as torch operators.

docs/kernels.md says how to add a phase. Importing this package imports neither torch nor a compiler.
"""
