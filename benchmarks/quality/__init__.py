"""What River does to quality, and what other answers to missing KV entries cost: ``python -m benchmarks.quality``."""
