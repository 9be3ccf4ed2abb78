"""What each command of the command line does: one call of the API, and what it prints.

A module for each command. Results go to standard output, progress and messages to standard error.
"""
