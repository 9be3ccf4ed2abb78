"""Measurements of our path beside a naive one, in one process: `dora-ray bench step` and `dora-ray bench data`.

Machines differ and are shared, so what counts is the ratio of the two paths, taken in turns.
"""
