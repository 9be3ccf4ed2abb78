"""Benchmarks against a naive path in the same process: `dora-ray bench step` and `dora-ray bench data`.

Machines differ and are shared, so the figure to compare is the ratio of the two paths, which take turns.
"""
