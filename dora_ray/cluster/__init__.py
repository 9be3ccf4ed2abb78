"""The Ray cluster that a run is on: its token, its nodes, its jobs."""
