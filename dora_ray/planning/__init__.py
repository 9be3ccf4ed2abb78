"""Estimates of a run before it is started: disk, time, cores, memory, money, and what limits it."""
