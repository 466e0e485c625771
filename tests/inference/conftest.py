"""A scan, and a bundle that segments it."""

from __future__ import annotations

from pathlib import Path

import pytest
from heads import save_scan, save_tiny_bundle


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    return save_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz")


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory, scan) -> Path:
    return save_tiny_bundle(scan, tmp_path_factory.mktemp("bundle") / "tiny")
