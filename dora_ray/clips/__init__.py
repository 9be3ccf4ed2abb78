"""Plan the clips of every slot, and read them from the frame store."""
