"""The commands of the command line: one call of the API each, and the printing of its result.

A module for each command. Results go to standard output, progress and messages to standard error.
"""
