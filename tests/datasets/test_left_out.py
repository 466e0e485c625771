"""What data sets have too little or too much of: no case is lost, joined with another or listed twice in silence."""

import gzip
import json

import numpy as np
import pytest
from layouts import atlas, decathlon, files, head, nnunet, orcascore, write
from metaimages import write_metaimage
from pairs import SHAPE, write_case

from grcsf_fast.data.images import OneChannel
from grcsf_fast.datasets.cases_file import CasesError
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of


def listed(layout, *roots, **choices):
    return list_cases_of(layout, roots, **choices)[0]


def unpacked(path):
    """A copy as a viewer or SPM wants it."""
    copy = path.with_suffix("")
    copy.write_bytes(gzip.decompress(path.read_bytes()))
    return copy


def changed(root, **keys):
    """``dataset.json`` with other values."""
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_mask_of_atlas_without_its_image(tmp_path):
    root = atlas(tmp_path)
    next(root.rglob("sub-r001s003_ses-1*T1w.nii.gz")).unlink()
    with pytest.raises(LayoutError, match=r"image of every lesion mask; found .*, but not one for sub-r001s003_ses-1_"):
        listed("atlas-r2", root)


def test_a_mask_of_atlas_beside_its_unpacked_copy(tmp_path):
    """Which may have been edited: they were joined."""
    root = atlas(tmp_path)
    copy = unpacked(next(root.rglob("sub-r001s003_ses-1*mask.nii.gz")))
    with pytest.raises(LayoutError, match=rf"expected one file of this name, found {copy.name} too; keep one of them"):
        listed("atlas-r2", root)


def of_bids(root, *names):
    for number, name in enumerate(names):
        image, mask = head(number, (8, 9, 7))
        write(root / f"{name}_T1w.nii.gz", image)
        write(root / f"{name}_label-lesion_mask.nii.gz", mask)
    return root


def test_sessions_of_bids_that_only_folders_name(tmp_path):
    """Their masks were joined, on the image of the first."""
    root = of_bids(tmp_path, *(f"sub-{one}/ses-{two}/anat/sub-{one}" for one in "12" for two in "12"))
    said = r"expected the session in the names of files, .*, found sub-1/ses-1/anat/sub-1_l.* and sub-1/ses-2/anat/sub-"
    with pytest.raises(LayoutError, match=said):
        listed("bids", root, folds=2)


def test_one_session_of_bids_that_only_a_folder_names(tmp_path):
    root = of_bids(tmp_path, *(f"sub-{one}/ses-1/anat/sub-{one}" for one in "12"))
    assert [case.name for case in listed("bids", root, folds=2).cases] == ["sub-1", "sub-2"]


def test_a_mask_of_bids_beside_its_unpacked_copy(tmp_path):
    root = of_bids(tmp_path, "sub-1/anat/sub-1", "sub-2/anat/sub-2")
    copy = unpacked(root / "sub-2/anat/sub-2_label-lesion_mask.nii.gz")
    with pytest.raises(LayoutError, match=rf"expected one file of this name, found {copy.name} too"):
        listed("bids", root, folds=2)


def test_two_references_of_a_patient_of_orcascore(tmp_path):
    """The last one in the order of folders was taken."""
    root = orcascore(tmp_path)
    write_metaimage(root / "old" / "TRV1P1R.mhd", np.zeros(SHAPE, np.uint8))
    said = r"expected one TRV1P1R, found Training Set/Reference standard/TRV1P1R\.mhd and old/TRV1P1R\.mhd"
    with pytest.raises(LayoutError, match=said):
        listed("orcascore", root)


def test_a_reference_of_orcascore_without_its_image(tmp_path):
    root = orcascore(tmp_path)
    (root / "Training Set/Images/TRV2P2CTI.mhd").unlink()
    with pytest.raises(LayoutError, match=r"image TRV\*P\*CTI of every .*, but not one for TRV2P2R\.mhd"):
        listed("orcascore", root)


@pytest.mark.parametrize("part", ["Tr", "Ts"])
def test_a_mask_of_nnunet_without_its_images(tmp_path, part):
    root = nnunet(tmp_path)
    files(root / f"labels{part}", "prostate_07.nii.gz", "._x.nii.gz", "plans.json")
    with pytest.raises(LayoutError, match=rf"but not images{part}/prostate_07_0000\.nii\.gz and"):
        listed("nnunet", root)


def test_channels_of_nnunet_that_are_normalised_alike(tmp_path):
    root = nnunet(tmp_path, channel_names={"0": "CT", "1": "CT"})
    assert listed("nnunet", root).channels == ("CT_0", "CT_1")


def test_an_image_under_two_names(tmp_path):
    """In two folds it would be validated on by what was trained on it."""
    root = nnunet(tmp_path)
    (root / "imagesTr/same_0000.nii.gz").symlink_to(root / "imagesTr/prostate_01_0000.nii.gz")
    names = {name: [f"imagesTr/{own}_000{place}.nii.gz" for place in range(2)] for name, own in (
        ("first", "prostate_01"), ("second", "prostate_01"), ("other", "prostate_02"),
    )}  # fmt: skip
    names["second"][0] = "imagesTr/same_0000.nii.gz"
    entries = {name: {"images": own, "label": "labelsTr/prostate_01.nii.gz"} for name, own in names.items()}
    changed(root, dataset=entries)
    said = r"expected images of its own for every subject, found .*same_0000\.nii\.gz as that of first and of second"
    with pytest.raises(CasesError, match=said):
        listed("nnunet", root, folds=2)
    raters = {"first": "sub-1_rater-1", "second": "sub-1_rater-2", "other": "sub-2"}
    changed(root, dataset={raters[name]: entry for name, entry in entries.items()})
    folds = {case.name: case.fold for case in listed("nnunet", root, folds=2).cases}
    assert folds["sub-1_rater-1"] == folds["sub-1_rater-2"] != folds["sub-2"]


def test_absolute_paths_in_a_list_of_the_decathlon(tmp_path, monkeypatch):
    """Of a root that is not: it ended as a bug of ours."""
    root = decathlon(tmp_path)
    training = json.loads((root / "dataset.json").read_text())["training"]
    changed(root, training=[{key: str(root / file) for key, file in item.items()} for item in training])
    monkeypatch.chdir(tmp_path)
    assert listed("decathlon", root.name).cases[0].images[0] == OneChannel(root / "imagesTr/BRATS_001.nii.gz", 0)
    (root / "imagesTr/BRATS_002.nii.gz").unlink()
    with pytest.raises(LayoutError, match=rf"but not {root}/imagesTr/BRATS_002\.nii\.gz"):
        listed("decathlon", root.name)


def test_cases_for_validation_in_a_list_of_the_decathlon(tmp_path):
    """As MONAI's lists have them; they were left out."""
    root = decathlon(tmp_path)
    first, *others = json.loads((root / "dataset.json").read_text())["training"]
    changed(root, training=others, validation=[first])
    with pytest.raises(LayoutError, match='under "training", of which folds are drawn, found 1 under "validation" too'):
        listed("decathlon", root)


@pytest.mark.parametrize("mask", [None, "*.nii.gz"])
def test_masks_of_pairs_without_an_image(tmp_path, mask):
    for name in "abc":
        write_case(tmp_path, name)
    (tmp_path / "images" / "b.nii.gz").unlink()
    said = r"masks: left out are masks without an image, 1 of them, the first b\.nii\.gz$"
    with pytest.warns(UserWarning, match=said):
        found = listed("pairs", tmp_path / "images", tmp_path / "masks", folds=2, mask=mask)
    assert [case.name for case in found.cases] == ["a", "c"]


@pytest.mark.parametrize("mask", [None, "*.nii.gz"])
def test_residual_maps_beside_masks_that_a_prediction_wrote(tmp_path, mask):
    """They are no masks, and of none of them an image is missing."""
    for name in "abc":
        write_case(tmp_path, name)
        write(tmp_path / "masks" / f"{name}_residual50.nii.gz", np.zeros(SHAPE, np.float32))
    roots = tmp_path / "images", tmp_path / "masks"
    assert [case.name for case in listed("pairs", *roots, folds=2, mask=mask).cases] == ["a", "b", "c"]
    (tmp_path / "images" / "b.nii.gz").unlink()
    with pytest.warns(UserWarning, match=r"masks without an image, 1 of them, the first b\.nii\.gz$"):
        listed("pairs", *roots, folds=2, mask=mask)
