"""Volumes in, lesion masks out."""
