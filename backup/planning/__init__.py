"""Decisions made before a byte moves: what to back up, what to store, what to keep.  Pure functions over values."""
