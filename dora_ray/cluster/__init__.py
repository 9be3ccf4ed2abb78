"""Ray clusters: authentication, nodes, and jobs."""
