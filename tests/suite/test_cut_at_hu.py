"""Benchmarks of bundles that count lesion above some Hounsfield units alone."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from heads import tiny_bundle

from benchmarks import calibrate, plain
from grcsf_fast import Predictor, use_backend
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.errors import ArgumentError

LIMIT = 130.0


def test_the_plain_path_cuts_as_predict_does(tmp_path):
    """Before lesions are told apart; some voxels have exactly the limit, and the axes are not in order."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-50, 400, (30, 28, 12)).astype(np.int16)
    hu[10:13, 10:13] = -1000  # air inside, as predict does not look at what is around a body
    hu[5:8, 5:8, 5] = LIMIT
    affine = np.array([[0, -2.0, 0, 20], [2.0, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(hu, affine), path)
    made = tiny_bundle()
    made = replace(made, network=made.network.eval(), mae=made.mae.eval())
    bundle = replace(made, preprocessing=Preprocessing((2.0, 2.0, 3.0), "ct", hu_window=(-160.0, 600.0)))
    probability = np.asarray(Predictor(bundle, precision="float32")(path).probability.dataobj)
    levels = {"probability_threshold": float(np.quantile(probability, 0.5))}
    levels["hysteresis_threshold"] = float(np.quantile(probability[hu > LIMIT], 0.999))
    masks = {}
    for above in (None, LIMIT):
        tried = replace(bundle, above_hu=above, **levels)
        expected = np.asarray(Predictor(tried, precision="float32")(path).mask.dataobj)
        with use_backend("reference"):
            plain.predict(tried, path, tmp_path / f"{above}", "scan")
        masks[above] = np.asarray(nib.load(tmp_path / f"{above}" / "scan.nii.gz").dataobj)
        assert masks[above].any()
        assert (masks[above] != expected).mean() < 1e-3  # rounding at the threshold
    assert masks[None][hu <= LIMIT].any()
    assert not masks[LIMIT][hu <= LIMIT].any()
    assert (masks[None] * (hu > LIMIT) != masks[LIMIT]).any()  # lesions that lost their peak


def test_synthetic_heads_calibrate_no_such_bundle():
    with pytest.raises(ArgumentError, match=r"^bundle: expected one without above_hu, .* got 130; docs/how-to"):
        calibrate.subjects(replace(tiny_bundle(), above_hu=LIMIT))
