"""Arguments of another kind than a call takes are named, with what was expected and what came."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles import tiny_bundle, tiny_mae, tiny_network

from grcsf_fast import Bundle, Predictor, Preprocessing, save_bundle
from grcsf_fast.errors import ArgumentError, ArgumentTypeError
from grcsf_fast.pretrained.export import export_program
from grcsf_fast.pretrained.monai_bundle import export_monai

IMAGE = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_bundle())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Predictor({"network": 1}), "bundle: expected a bundle, or its folder or name, got dict"),
        (lambda: Predictor(None), "bundle: expected a bundle, or its folder or name, got None"),
        (
            lambda: Predictor(tiny_network()),
            r"bundle: expected a bundle, or its folder or name, got a network; Bundle\(network, mae, Preprocessing",
        ),
        (
            lambda: Bundle(tiny_network(), "demo", Preprocessing()),
            "mae: expected MaskedAutoencoder or None, got 'demo'",
        ),
        (lambda: Bundle(tiny_network(), tiny_mae(), None), "preprocessing: expected Preprocessing, got None"),
        (lambda: Bundle(tiny_mae(), None, Preprocessing()), "network: expected GRCSF or None, got MaskedAutoencoder"),
        (
            lambda: Bundle(tiny_network(), tiny_mae(), Preprocessing(), {"mask_ratios": (0.5, 0.75)}),
            "residual_maps: expected ResidualMapSettings or None, got dict",
        ),
        (
            lambda: Bundle(tiny_network(), tiny_mae(), Preprocessing(), labels=("core",)),
            "labels: expected Labels or None, got tuple",
        ),
        (lambda: save_bundle(tiny_network(), "nowhere"), "bundle: expected a bundle, got a network; Bundle"),
        (lambda: export_program(tiny_network(), "nowhere.pt2"), "bundle: expected a bundle, got a network; Bundle"),
        (
            lambda: export_monai("demo", "nowhere"),
            r"bundle: expected a bundle, got 'demo'; load_bundle\(\.\.\.\) reads",
        ),
    ],
)
def test_bundles_that_are_none(call, message):
    with pytest.raises(ArgumentTypeError, match=f"^{message}"):
        call()
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("sources", "got"),
    [
        ("scans", "'scans'"),
        (Path("scans"), "'scans'"),
        (IMAGE, "Nifti1Image"),
        (np.ones((4, 4, 4)), "ndarray"),
        (torch.ones(1, 4, 4, 4), "Tensor"),
        (3, "int"),
    ],
)
def test_one_source_is_not_several(predictor, sources, got):
    """A name was taken letter by letter. Nobody has to ask for a result to learn of it."""
    with pytest.raises(ArgumentTypeError, match=rf"^sources: expected several of them, such as .*, got {got}; predict"):
        predictor.predict_many(sources)


def test_what_else_is_said_at_once(predictor):
    with pytest.raises(ArgumentError, match=r"^failures: expected 'raise' or 'return', got 'ignore'"):
        predictor.predict_many([], failures="ignore")
    with pytest.raises(
        ArgumentError, match=r"^affine: expected none beside list, whose images have their own; an array"
    ):
        predictor([IMAGE, IMAGE], affine=np.eye(4))
