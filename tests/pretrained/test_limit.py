"""The limit above which voxels are lesion, in bundles and in what is exported of them."""

import json
import re
from dataclasses import replace

import pytest
from bundles import edit, tiny_bundle

from grcsf_fast.errors import ArgumentError
from grcsf_fast.pretrained.bundle import BundleError, load_bundle, save_bundle
from grcsf_fast.pretrained.export import _settings


def test_it_is_kept(tmp_path):
    folder = save_bundle(replace(tiny_bundle(), above_hu=130), tmp_path / "bundle")
    assert load_bundle(folder).above_hu == 130.0
    assert json.loads((folder / "config.json").read_text())["above_hu"] == 130.0


def test_bundles_without_it_stay_as_they_were(tmp_path):
    folder = save_bundle(tiny_bundle(), tmp_path / "bundle")
    assert "above_hu" not in json.loads((folder / "config.json").read_text())
    assert load_bundle(folder).above_hu is None
    edit(folder, lambda config: config.update(above_hu=None))
    assert load_bundle(folder).above_hu is None


@pytest.mark.parametrize("value", ["130", True, [130], float("nan"), float("inf"), 10**400])
def test_what_is_no_limit(tmp_path, value):
    expected = "above_hu: expected a finite number, or None, got "
    with pytest.raises(ArgumentError, match=expected):
        replace(tiny_bundle(), above_hu=value)
    folder = save_bundle(tiny_bundle(), tmp_path / "bundle")
    edit(folder, lambda config: config.update(above_hu=value))
    with pytest.raises(BundleError, match=re.escape(f"{folder / 'config.json'}: ") + ".*" + expected):
        load_bundle(folder)


def test_other_keys_are_unknown_all_the_same(tmp_path):
    folder = save_bundle(replace(tiny_bundle(), above_hu=130), tmp_path / "bundle")
    edit(folder, lambda config: config.update(below_hu=3))
    with pytest.raises(BundleError, match=r"unknown keys \['below_hu'\]"):
        load_bundle(folder)


def test_exported_programs_say_it():
    """Which make no mask of their own."""
    bundle = tiny_bundle()
    assert "above_hu" not in json.loads(_settings(bundle, bundle.network))
    assert json.loads(_settings(replace(bundle, above_hu=130), bundle.network))["above_hu"] == 130.0
