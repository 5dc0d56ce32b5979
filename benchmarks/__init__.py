"""Benchmarks of the engine against other programs. A speed is a ratio of two commands that run in turn."""
