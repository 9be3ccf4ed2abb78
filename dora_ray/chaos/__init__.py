"""Faults on purpose: a training is killed, drained, shrunk and grown, and compared with one that was left alone."""
