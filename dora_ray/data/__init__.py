"""Videos, the frame store, the clip plan and the clip stream."""
