"""Bundles of MONAI: its own runner executes them, and finds the masks that ``predict`` writes."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from awake import awake
from bundles import tiny_bundle as strange_bundle
from heads import SPACING, save_scan, tiny_bundle
from monai.bundle import ConfigParser, run
from monai.data import MetaTensor
from small import autoencoder

from grcsf_fast import GRCSF, Predictor
from grcsf_fast.data.files import list_cases
from grcsf_fast.data.intensities import Intensities, Preprocessing
from grcsf_fast.data.labels import Labels, any_label
from grcsf_fast.data.masks import load_mask, load_numbers
from grcsf_fast.errors import ArgumentError
from grcsf_fast.inference.monai_inferer import VolumeInferer, list_images
from grcsf_fast.pretrained.bundle import Bundle, BundleError
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


@pytest.mark.parametrize("channels", [("image",), ("T1w", "FLAIR")])
@pytest.mark.parametrize("inputs", [torch.zeros(1, 1, 4, 4, 4), MetaTensor(torch.zeros(1, 3, 4, 4, 4)), None])
def test_what_the_inferer_refuses(inputs, channels):
    inferer = VolumeInferer({}, {}, channels=channels)
    with pytest.raises(
        ArgumentError, match=re.escape(f"inputs: expected a MetaTensor (B,{len(channels)},X,Y,Z), got ")
    ):
        inferer(inputs, tiny_bundle().network)


CLASSES = Labels(("oedema", "core"), ((1,), (4,)))
REGIONS = Labels(("whole", "core", "rim"), ((1, 2, 4), (2, 4), (4,)), exclusive=False)


def of_several(channels, labels, **changes):
    """A bundle of so many channels, each with intensities of its own, and of these labels, with random weights."""
    torch.manual_seed(1)
    mae = autoencoder(2, channels, patch_size=8)
    settings = {"features": (4, 8, 8), "patch_size": 4, "rcu_levels": (0, 1), "residual_channels": 4, "neighbours": 1}
    network = GRCSF(2, channels, 1 if labels is None else labels.outputs, **settings | {"requires_maps": True})
    others = () if channels == 1 else (Intensities("mri", percentiles=(1.0, 98.0)),) * (channels - 1)
    names = ("T1w", "FLAIR")[:channels] if channels > 1 else ("image",)
    preprocessing = Preprocessing(SPACING, others=others)
    return Bundle(awake(network).eval(), mae, preprocessing, channels=names, labels=labels, **changes)


def with_thresholds(bundle, case):
    """About 4 % of the case are lesion, and not all of what it finds reaches the second threshold."""
    found = np.asarray(Predictor(bundle, precision="float32")(case).probability.dataobj)
    probability = torch.from_numpy(found)
    if bundle.labels is not None:
        probability = any_label(probability.movedim(3, 0), bundle.labels)
    first, second = (float(np.quantile(probability.numpy(), share)) for share in (0.96, 0.999))
    return replace(bundle, probability_threshold=first, hysteresis_threshold=second)


@pytest.fixture
def cases(images, tmp_path):
    """Of two channels on oblique axes: a file for each, and one whose fourth axis they are."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.nii.gz", "b.nii"):
        scan = nib.load(images / name)
        first = scan.get_fdata(dtype=np.float32)
        second = np.where(first > 0, first.max() - first + 7 * np.sqrt(first), 0).astype(np.float32)
        if name == "a.nii.gz":
            for number, data in enumerate((first, second)):
                nib.save(nib.Nifti1Image(data, scan.affine), folder / f"a_{number:04d}.nii.gz")
        else:
            nib.save(nib.Nifti1Image(np.stack([first, second], 3), scan.affine), folder / "b.nii")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("channels", "labels"), [(2, None), (2, CLASSES), (2, REGIONS), (1, CLASSES), (1, REGIONS)],
    ids=["channels", "channels and classes", "channels and regions", "classes", "regions"],
)  # fmt: skip
def test_several_channels_and_labels(images, cases, tmp_path, channels, labels):
    """The masks of classes hold their numbers as ours do; of regions there is a map for each."""
    files = {"a": cases / "a_0000.nii.gz", "b": cases / "b.nii"} if channels > 1 else {
        "a": images / "a.nii.gz", "b": images / "b.nii"
    }  # fmt: skip
    bundle = with_thresholds(of_several(channels, labels, tta_flip=True), files["a"])
    export_monai(bundle, tmp_path / "bundle")
    folder = cases if channels > 1 else images
    found = run_in_monai(tmp_path / "bundle", folder, tmp_path / "masks")
    assert list(found) == ["a_seg", "b_seg"]
    predictor, shown = Predictor(bundle, precision="float32"), set()
    for name, file in files.items():
        expected, image = predictor(file), nib.load(found[f"{name}_seg"])
        mask = np.asarray(expected.mask.dataobj)
        assert 0 < np.mean(mask > 0) < 0.2
        shown |= set(np.unique(mask))
        values = np.asarray(image.dataobj)
        if labels is REGIONS:
            mask = np.stack([labels.marked(mask, region) for region in labels.names], 3)
        assert values.shape == mask.shape
        assert values.dtype == np.uint8
        assert np.allclose(image.affine, nib.load(file).affine, atol=1e-4)
        # As of one channel: MONAI keeps affines in another precision.
        assert np.mean(values != mask) < 1e-4
    assert shown == {0, 1} if labels is None else len(shown) > 2


def test_a_process_that_knows_monai_alone(cases, tmp_path):
    """What the configuration imports is all that it needs."""
    folder = export_monai(of_several(2, None), tmp_path / "bundle")
    program = f"""
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config({str(folder / "configs" / "inference.json")!r})
parser["dataset_dir"] = {str(cases)!r}
print(len(parser.get_parsed_content("datalist")))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["2"]), done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_limit_in_hounsfield_units_is_that_of_the_first_channel(cases, tmp_path):
    bundle = of_several(2, CLASSES)
    limit = float(np.quantile(nib.load(cases / "a_0000.nii.gz").get_fdata(), 0.95))
    bundle = replace(with_thresholds(bundle, cases / "a_0000.nii.gz"), hysteresis_threshold=0.0, above_hu=limit)
    export_monai(bundle, tmp_path / "bundle")
    (cases / "b.nii").unlink()
    found = run_in_monai(tmp_path / "bundle", cases, tmp_path / "masks")
    expected = np.asarray(Predictor(bundle, precision="float32")(cases / "a_0000.nii.gz").mask.dataobj)
    assert expected.any()
    assert np.mean(load_numbers([found["a_seg"]], None, "", CLASSES.every).voxels != expected) < 1e-4


def test_what_is_said_of_channels_and_labels(tmp_path):
    said = {}
    for name, labels in (("classes", CLASSES), ("regions", REGIONS)):
        folder = export_monai(of_several(2, labels), tmp_path / name)
        metadata = json.loads((folder / "configs" / "metadata.json").read_text())
        said[name] = metadata["network_data_format"]
        image = said[name]["inputs"]["image"]
        assert (image["num_channels"], image["channel_def"]) == (2, {"0": "T1w", "1": "FLAIR"})
    classes, regions = (said[name]["outputs"]["pred"] for name in ("classes", "regions"))
    assert (classes["num_channels"], classes["value_range"]) == (1, [0, 4])
    assert classes["channel_def"] == {"0": "0 background, 1 oedema, 4 core"}
    assert (regions["num_channels"], regions["value_range"]) == (3, [0, 1])
    assert regions["channel_def"] == {"0": "whole", "1": "core", "2": "rim"}


def test_a_missing_channel_is_named(images, cases):
    assert list_images(images, 1) == [str(images / "a.nii.gz"), str(images / "b.nii")]
    assert list_images(cases, 2) == [[str(cases / f"a_000{number}.nii.gz") for number in "01"], str(cases / "b.nii")]
    (cases / "a_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"a: expected channel 1 in .*a_0001"):
        list_images(cases, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "expected a NIfTI file or a folder of them, found nothing"),
        ([], "expected files ending in .nii or .nii.gz, found none"),
        (["a.nii", "a.nii.gz", "b.nii"], "a.nii and a.nii.gz are the same case"),
    ],
)
def test_images_of_one_channel_that_would_leave_no_mask_or_one_for_two(tmp_path, files, message):
    """A mask of the one would be replaced by that of the other."""
    folder = export_monai(of_several(1, None), tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["dataset_dir"] = str(tmp_path / "images")
    if files is not None:
        (tmp_path / "images").mkdir()
        for file in files:
            (tmp_path / "images" / file).touch()
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("datalist")
    assert message in str(caught.value.__cause__)


def test_images_of_one_channel_are_nifti_files_by_their_whole_names(tmp_path):
    """A segmentation of Slicer's beside its scan is none that MONAI's reader takes, and scans may have numbers."""
    scans = ["a.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "b.nii"]
    for name in (*scans, "a.seg.nrrd", "a.mha", "c.hdr", ".d.nii"):
        (tmp_path / name).touch()
    assert list_images(tmp_path, 1) == [str(tmp_path / name) for name in sorted(scans)]
    (tmp_path / "e.nii.gz").symlink_to(tmp_path / "none.nii.gz")
    with pytest.raises(OSError, match=r"e\.nii\.gz: expected a NIfTI file, found a link to nothing"):
        list_images(tmp_path, 1)


def test_a_compiled_autoencoder_has_the_names_of_a_plain_one(tmp_path):
    bundle = of_several(1, None)
    network = copy.deepcopy(bundle.network)
    network.mae = torch.compile(bundle.mae, backend="eager")
    expected, found = (
        torch.load(export_monai(one, tmp_path / name) / "models" / "model.pt", weights_only=True)
        for name, one in (("plain", bundle), ("compiled", replace(bundle, network=network, mae=None)))
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["$print(1)", "@device", "%file", "a@::b"])
def test_names_that_monai_would_execute_are_refused(tmp_path, name):
    bundle = of_several(2, CLASSES)
    for changes in ({"channels": ("T1w", name)}, {"labels": Labels(("core", name), ((1,), (2,)))}):
        with pytest.raises(BundleError, match="expected names that MONAI does not take for an expression or a refer"):
            export_monai(replace(bundle, **changes), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
