"""Estimates before a run: disk, time, cores, memory, cost, and the bottleneck."""
