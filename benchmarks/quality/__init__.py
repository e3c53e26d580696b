"""What River does to quality: ``python -m benchmarks.quality``, and the problems of ``benchmarks.tasks``."""
