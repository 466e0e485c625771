"""Data sets on disk as cases."""
