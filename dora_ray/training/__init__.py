"""Elastic training on Ray Train: slots, exact sums, checkpoints."""
