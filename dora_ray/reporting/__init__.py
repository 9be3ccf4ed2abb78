"""Pages about runs and sweeps."""
