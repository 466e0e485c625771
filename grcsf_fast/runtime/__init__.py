"""Devices, precision, processes, signals, progress."""
