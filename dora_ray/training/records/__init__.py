"""What a run writes: journal, checkpoints, status, TensorBoard."""
