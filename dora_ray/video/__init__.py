"""Videos: sources, index, and decoders that turn a file into timed frames."""
