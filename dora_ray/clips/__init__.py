"""Which clips a slot is made of, and how they are read."""
