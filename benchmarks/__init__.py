"""Benchmarks of River Compile; every file but `common.py` is a command-line program."""
