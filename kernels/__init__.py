"""Kernels of the two ops, installed as ``grcsf_fast.kernels``."""
