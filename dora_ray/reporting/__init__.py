"""HTML and Markdown reports of runs and sweeps."""
