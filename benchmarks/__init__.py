"""Measurements: the pytest-benchmark suite with its report and comparison, and programs for larger questions."""
