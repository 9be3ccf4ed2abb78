"""The answer to "why does it not work here?": what a machine and a cluster have and lack, in sentences."""
