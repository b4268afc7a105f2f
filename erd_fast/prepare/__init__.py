"""Preparation of data before a run; training does not import it."""
