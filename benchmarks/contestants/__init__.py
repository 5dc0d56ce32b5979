"""The programs that the benchmarks compare. Each rank runs one of them as a module."""
