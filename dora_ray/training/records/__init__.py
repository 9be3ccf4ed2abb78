"""Files that a run writes: journal, checkpoints, status, TensorBoard."""
