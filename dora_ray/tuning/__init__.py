"""Sweeps on Ray Tune: many runs that answer one question."""
