"""A saved bundle."""

from pathlib import Path

import pytest
from bundles import tiny_bundle

from grcsf_fast.pretrained.bundle import save_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bundle(tiny_bundle(), tmp_path / "bundle")
