"""Experiments: one file is one table or figure; benchmarks are `bench_*.py`."""
