"""Survival of kills, drains and resizes: requests to workers, the controller's callback, spare processes."""
