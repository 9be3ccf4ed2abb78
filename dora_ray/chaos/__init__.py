"""Fault injection: a training run is killed, drained, shrunk and grown, and compared with an undisturbed one."""
