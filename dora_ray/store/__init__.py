"""Frame store: ingest, which decodes each frame once, the stored frames, and their statistics."""
