"""DoRA's method in pure torch: no Ray, no files, no configuration, no process groups, no hidden random numbers."""
