"""Examples of River Compile: a demo, and the small real models that it, the tests and the benchmarks share."""
