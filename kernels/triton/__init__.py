"""Triton kernels for CUDA and ROCm; imported on first use."""
