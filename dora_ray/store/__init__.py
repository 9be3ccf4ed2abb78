"""Frames decoded once: ingest, the frame store, its statistics."""
