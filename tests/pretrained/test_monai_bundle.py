"""Bundles of MONAI: its own runner executes them, and finds the masks that ``predict`` writes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles import tiny_bundle as strange_bundle
from heads import save_scan, tiny_bundle
from monai.bundle import run
from monai.data import MetaTensor

from grcsf_fast import GRCSF, Predictor
from grcsf_fast.data.files import list_cases
from grcsf_fast.data.labels import Labels
from grcsf_fast.data.masks import load_mask
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.monai_inferer import VolumeInferer
from grcsf_fast.pretrained.bundle import BundleError
from grcsf_fast.pretrained.monai_bundle import export_monai


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two scans of different grids, on oblique axes."""
    folder = tmp_path_factory.mktemp("images")
    scan = nib.load(save_scan(folder / "a.nii.gz"))
    turned = scan.as_reoriented(nib.orientations.axcodes2ornt("PSR"))
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj)[2:], turned.affine), folder / "b.nii")
    return folder


def with_threshold(bundle, scan, **changes):
    """One that makes 2 % of the scan lesion."""
    bundle = replace(bundle, **changes)
    bundle.network.eval()
    probability = np.asarray(Predictor(bundle, precision="float32")(scan).probability.dataobj)
    return replace(bundle, probability_threshold=float(np.quantile(probability, 0.98)))


def with_peak(bundle, scan):
    """Some of the lesions that it finds in the scan, and not all, reach its second threshold."""
    every = Predictor(bundle, precision="float32")(scan)
    inside = np.asarray(every.probability.dataobj)[np.asarray(every.mask.dataobj) > 0]
    return replace(bundle, hysteresis_threshold=float(np.quantile(inside, 0.95)))


def run_in_monai(folder: Path, images: Path, output: Path, **changes) -> dict[str, Path]:
    run(
        config_file=str(folder / "configs" / "inference.json"), meta_file=str(folder / "configs" / "metadata.json"),
        bundle_root=str(folder), dataset_dir=str(images), output_dir=str(output), device="$torch.device('cpu')",
        **changes,
    )  # fmt: skip
    return list_cases(output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("maps", [True, False])
def test_monais_runner_finds_the_same_masks(images, tmp_path, maps):
    if maps:
        changes = {"tta_flip": True, "tta_scales": (1.0, 0.9)}
        bundle = with_threshold(tiny_bundle(requires_maps=True), images / "a.nii.gz", **changes)
    else:
        bundle = with_threshold(tiny_bundle(rcu_levels=()), images / "a.nii.gz", mae=None)
    every, bundle = Predictor(bundle, precision="float32"), with_peak(bundle, images / "a.nii.gz")
    export_monai(bundle, tmp_path / "bundle")
    found = run_in_monai(tmp_path / "bundle", images, tmp_path / "masks")
    assert list(found) == ["a_seg", "b_seg"]
    predictor = Predictor(bundle, precision="float32")
    for name, file in (("a_seg", "a.nii.gz"), ("b_seg", "b.nii")):
        expected, mask = predictor(images / file), load_mask(found[name])
        assert np.allclose(mask.affine, nib.load(images / file).affine, atol=1e-4)
        assert 0 < np.mean(mask.voxels) < np.mean(np.asarray(every(images / file).mask.dataobj)) - 1e-3
        # MONAI keeps affines in another precision: a voxel at the threshold may change sides.
        assert np.mean(mask.voxels != np.asarray(expected.mask.dataobj)) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_batch_of_two(images, tmp_path):
    """Volumes of one shape, each on its own grid; the second upside down."""
    (tmp_path / "images").mkdir()
    scan = nib.load(images / "a.nii.gz")
    nib.save(scan, tmp_path / "images" / "a.nii.gz")
    turned = scan.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, scan.shape[2] - 1], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[:, :, ::-1], turned), tmp_path / "images" / "b.nii.gz")
    bundle = with_threshold(tiny_bundle(rcu_levels=()), images / "a.nii.gz", mae=None)
    export_monai(bundle, tmp_path / "bundle")
    found = run_in_monai(tmp_path / "bundle", tmp_path / "images", tmp_path / "masks", **{"dataloader#batch_size": 2})
    first, second = (load_mask(found[name]) for name in ("a_seg", "b_seg"))
    assert np.allclose(second.affine, turned, atol=1e-4)
    assert first.voxels.any()
    assert np.mean(first.voxels != second.voxels[:, :, ::-1]) < 1e-4


def test_what_is_written(tmp_path):
    bundle = strange_bundle()
    folder = export_monai(bundle, tmp_path / "bundle")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["configs/inference.json", "configs/metadata.json", "models/model.pt"]
    config = json.loads((folder / "configs" / "inference.json").read_text())
    assert config["inferer"]["preprocessing"]["hu_window"] == [0.0, 80.0]
    assert config["inferer"]["residual_maps"] == {"mask_ratios": [0.5, 0.75], "rounds": 2, "seed": 7, "signed": True}
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    assert torch.equal(state["mae.mask_token"], bundle.mae.mask_token)
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    for key in ("version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "description",
                "authors", "copyright", "network_data_format"):  # fmt: skip
        assert metadata[key], key


def test_networks_that_cannot_be_run(tmp_path):
    with pytest.raises(BundleError, match="trained with residual maps, and it holds no autoencoder"):
        export_monai(replace(strange_bundle(), mae=None), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("inputs", [torch.zeros(1, 1, 4, 4, 4), MetaTensor(torch.zeros(1, 2, 4, 4, 4)), None])
def test_what_the_inferer_refuses(inputs):
    inferer = VolumeInferer({}, {})
    with pytest.raises(ArgumentError, match=re.escape("inputs: expected a MetaTensor (B,1,X,Y,Z), got ")):
        inferer(inputs, tiny_bundle().network)


@pytest.mark.parametrize(
    ("channels", "labels"), [(("T1w", "FLAIR"), None), (("image",), Labels(("oedema", "core"), ((1,), (2,))))]
)
def test_several_channels_or_labels_are_refused(tmp_path, channels, labels):
    network = GRCSF(2, len(channels), 1 if labels is None else labels.outputs, (4, 8), rcu_levels=())
    bundle = replace(tiny_bundle(), network=network, mae=None, channels=channels, labels=labels)
    with pytest.raises(BundleError, match="expected one channel and one kind of lesion"):
        export_monai(bundle, tmp_path)
    assert not list(tmp_path.iterdir())
