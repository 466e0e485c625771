"""Weights of a network without effect: biases before an instance norm, which subtracts them again."""

import re

__all__ = ["cancelled"]

NAMES = re.compile(r"(encoder|decoder)\.\d+\.[03]\.bias|rcu\.(\d+\.)?stem\.0\.bias")


def cancelled(name: str) -> bool:
    """Of a parameter by its name; what it has of a gradient is rounding."""
    return NAMES.fullmatch(name) is not None
