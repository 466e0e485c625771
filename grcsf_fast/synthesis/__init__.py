"""Synthetic subjects on real anatomy."""
