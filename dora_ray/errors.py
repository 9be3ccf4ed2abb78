"""Every error that dora_ray raises on purpose, and the exit status each one ends the command line with.

    Exception
    └── DoRAError            1   something of ours went wrong
        ├── ConfigError      2   a configuration or a command that cannot work
        ├── VideoError       3   a video, or a frame store, that cannot be read
        ├── CheckpointError  4   a checkpoint that is missing, incomplete or of another model
        ├── ClusterError     5   the cluster has too little of what the run asks for
        └── DivergenceError  1   a number that is not finite stopped the run on every rank

A message says what was found, what is allowed, and what to do about it.
"""

from __future__ import annotations


class DoRAError(Exception):
    """Above all errors of dora_ray."""

    exit_status = 1


class ConfigError(DoRAError):
    """A configuration, an option or an output folder that cannot be used."""

    exit_status = 2


class VideoError(DoRAError):
    """A video or a frame store that cannot be read."""

    exit_status = 3


class CheckpointError(DoRAError):
    """A checkpoint that is missing, incomplete, damaged, or of another model or plan."""

    exit_status = 4


class ClusterError(DoRAError):
    """The cluster cannot give what the run asks for."""

    exit_status = 5


class DivergenceError(DoRAError):
    """A loss or a gradient that is not finite: all ranks stop together, naming the measure and the step."""
