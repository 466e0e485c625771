"""Masks compared with the truth."""
