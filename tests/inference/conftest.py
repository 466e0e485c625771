"""A scan, a bundle that segments it, and one of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from heads import save_scan, save_tiny_bundle, tiny_bundle

from grcsf_fast.pretrained.bundle import save_bundle


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    return save_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz")


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory, scan) -> Path:
    return save_tiny_bundle(scan, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle of random weights, whatever they segment."""
    return save_bundle(tiny_bundle(), tmp_path_factory.mktemp("bundle") / "tiny")
