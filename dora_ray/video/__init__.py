"""From a file to timed frames: sources, index, decoders."""
