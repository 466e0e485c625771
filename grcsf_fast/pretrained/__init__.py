"""Weights and their settings on disk."""
