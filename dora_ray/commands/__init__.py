"""Commands of the command line, one module each: call the API and print the result.

Results go to stdout, progress and messages to stderr.
"""
