"""Errors of dora_ray, with the exit status of the command line for each.

    Exception
    └── DoRAError            1   base class; any other failure
        ├── ConfigError      2   invalid configuration or command
        ├── VideoError       3   a video or frame store cannot be read
        ├── CheckpointError  4   a checkpoint is missing, incomplete or of another model
        ├── ClusterError     5   the cluster lacks resources that the run needs
        └── DivergenceError  1   a value that is not finite stopped the run on every rank

A message says what was found, what is allowed, and what to do.
"""

from __future__ import annotations


class DoRAError(Exception):
    """Base class of all errors of dora_ray."""

    exit_status = 1


class ConfigError(DoRAError):
    """A configuration, an option or an output folder is invalid."""

    exit_status = 2


class VideoError(DoRAError):
    """A video or a frame store cannot be read."""

    exit_status = 3


class CheckpointError(DoRAError):
    """A checkpoint is missing, incomplete, damaged, or of another model or plan."""

    exit_status = 4


class ClusterError(DoRAError):
    """The cluster cannot provide the resources that the run needs."""

    exit_status = 5


class DivergenceError(DoRAError):
    """A loss or gradient is not finite; all ranks stop at the same step, and the message names the value."""
