"""Versions of Python and of the packages whose numbers a result may depend on."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("grcsf-fast", "torch", "numpy", "nibabel", "monai", "scipy", "isal", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
