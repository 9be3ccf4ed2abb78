"""Diagnosis of a machine and a cluster: requirements met and missing, in sentences."""
