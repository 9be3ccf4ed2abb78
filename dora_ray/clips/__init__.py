"""Plan of the clips that each slot is made of, and the reading of them."""
