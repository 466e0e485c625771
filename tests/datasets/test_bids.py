"""BIDS data sets: which masks are lesions, and which image each belongs to."""

import pytest
from layouts import bids, head, write

from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of


def listed(root, **choices):
    return list_cases_of("bids", [root], **choices)[0]


@pytest.mark.filterwarnings("ignore:.* left out")
def test_bids(tmp_path):
    """Raw T1w and FLAIR, of which the FLAIR has a grid of its own; masks among the derivatives."""
    root = bids(tmp_path)
    listing = listed(root)
    assert listing.channels == ("T1w",)
    found = {case.name: case for case in listing.cases}
    assert sorted(found) == [f"sub-0{number}_ses-1" for number in range(1, 8)]
    case = found["sub-02_ses-1"]
    assert case.images == (root / "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz",)
    assert case.masks == (
        root / "derivatives/manual/sub-02/ses-1/anat/sub-02_ses-1_space-orig_label-lesion_mask.nii.gz",
    )
    assert (case.subject, case.site, case.lesion_ml) == ("sub-02", "B", pytest.approx(64 * 0.008))
    assert (found["sub-07_ses-1"].masks, found["sub-07_ses-1"].fold) == ((), None)


@pytest.mark.filterwarnings("ignore:.* the mask's name speaks of another image")
@pytest.mark.parametrize(
    "name",
    [
        "derivatives/x/sub-1/anat/sub-1_desc-lesion_dseg.nii.gz",
        "derivatives/x/sub-1/anat/sub-1_label-L_desc-T1lesion_mask.nii.gz",
        "derivatives/x/sub-1/anat/sub-1_label-L_mask.nii.gz",
        "sub-1/anat/sub-1_T1w_label-lesion_roi.nii.gz",
        "derivatives/labels/sub-1/anat/sub-1_FLAIR_lesion-manual.nii.gz",
        "derivatives/x/sub-1/anat/sub-1_space-FLAIR_label-lesion_mask.nii.gz",
        "derivatives/sub-1/sub-1_msk.nii.gz",
        "sub-1/anat/sub-1_lesion_mask.nii.gz",
        "sub-1/anat/sub-1_T1w_lesion_mask.nii.gz",
        "sub-1/anat/sub-1_lesions_seg.nii.gz",
        "sub-1/anat/sub-1_Lesion_mask.nii.gz",
        "sub-1/anat/sub-1_space-T1w_lesion_roi.nii.gz",
        "sub-1/anat/sub-1_T1wlesion_mask.nii.gz",
        "sub-1/anat/sub-1_seg-lesion_mask.nii.gz",
        "sub-1/anat/sub-1_class-lesion_mask.nii.gz",
    ],
)
def test_names_of_lesion_masks(tmp_path, name):
    image, mask = head(1, (8, 9, 7))
    for subject in "12":
        for kind in ("T1w", "FLAIR"):
            write(tmp_path / f"sub-{subject}/anat/sub-{subject}_{kind}.nii.gz", image)
        write(tmp_path / f"derivatives/brain/sub-{subject}/anat/sub-{subject}_desc-brain_mask.nii.gz", mask)
        write(tmp_path / name.replace("sub-1", f"sub-{subject}"), mask)
    listing = listed(tmp_path, folds=2)
    one = {"sub-1_T1w_l": ("T1w",), "sub-1_FLAIR_lesion": ("FLAIR",)}
    assert listing.channels == next((kinds for part, kinds in one.items() if part in name), ("T1w", "FLAIR"))
    assert listing.cases[0].masks == (tmp_path / name,)
    assert len(listing.cases[0].images) == len(listing.channels)


@pytest.mark.parametrize(
    "place",
    [
        *("sub-lesion{}", "sub-{}_ses-lesion", "sub-{}_acq-lesion", "sub-{}_space-lesion", "sub-{}_rec-lesionfilled"),
        "sub-{}_task-lesion",
    ],
)
def test_other_masks_whose_names_speak_of_a_lesion(tmp_path, place):
    """The entity says something else than what the mask marks."""
    image, mask = head(1, (8, 9, 7))
    for number in "12":
        name = place.format(number)
        write(tmp_path / f"{name}_T1w.nii.gz", image)
        write(tmp_path / f"{name}_desc-brain_mask.nii.gz", image.astype(bool).astype("uint8"))
        write(tmp_path / f"{name}_label-lesion_mask.nii.gz", mask)
    listing = listed(tmp_path, folds=2)
    assert [[path.name for path in case.masks] for case in listing.cases] == [
        [f"{place.format(number)}_label-lesion_mask.nii.gz"] for number in "12"
    ]


def test_bids_in_a_template_space(tmp_path):
    """The preprocessed image beside the mask belongs to it, and the raw one does not, as it has another grid."""
    image, mask = head(1, (8, 9, 7))
    for subject in "12":
        write(tmp_path / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz", image[2:])
        folder = tmp_path / f"derivatives/prep/sub-{subject}/anat"
        write(folder / f"sub-{subject}_space-MNI_desc-preproc_T1w.nii.gz", image)
        write(folder / f"sub-{subject}_space-MNI_label-lesion_mask.nii.gz", mask)
    listing = listed(tmp_path, folds=2)
    assert [case.images[0].name for case in listing.cases if case.masks] == [
        f"sub-{subject}_space-MNI_desc-preproc_T1w.nii.gz" for subject in "12"
    ]


def test_bids_that_cannot_be_told_apart(tmp_path):
    image, mask = head(1, (8, 9, 7))
    for run in (1, 2):
        write(tmp_path / f"sub-1/anat/sub-1_run-{run}_T1w.nii.gz", image)
    path = write(tmp_path / "sub-1/anat/sub-1_label-lesion_mask.nii.gz", mask)
    with pytest.raises(LayoutError, match=r"one T1w on the grid of .*, found sub-1_run-1_T1w.* and sub-1_run-2_T1w"):
        listed(tmp_path)
    path.rename(path.with_name("sub-1_run-2_label-lesion_mask.nii.gz"))
    write(tmp_path / "sub-2/anat/sub-2_T1w.nii.gz", image)
    write(tmp_path / "sub-2/anat/sub-2_label-lesion_mask.nii.gz", mask)
    assert listed(tmp_path, folds=2).cases[0].images[0].name == "sub-1_run-2_T1w.nii.gz"
    write(tmp_path / "sub-2/anat/sub-2_label-lesion_mask.nii.gz", mask[2:])
    with pytest.raises(LayoutError, match=r"sub-2_label-lesion_mask.*: expected an image on the grid of this lesion"):
        listed(tmp_path)
    (tmp_path / "sub-2/anat/sub-2_T1w.nii.gz").unlink()
    with pytest.raises(LayoutError, match=r"an image for every lesion mask; found sub-1/.*, but not one for sub-2/"):
        listed(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("run-1_label-lesion_mask", "run-2_label-lesion_mask"),
        ("acq-low_label-lesion_mask", "label-lesion_mask"),
        ("FLAIR_label-lesion_roi", "T1w_label-lesion_roi"),
        ("space-FLAIR_label-lesion_mask", "space-T1w_label-lesion_mask"),
    ],
)
def test_masks_of_several_images_are_not_joined(tmp_path, names):
    """On one grid, where the second one's lesions would be looked for in the first one's image."""
    image, mask = head(1, (8, 9, 7))
    for kind in ("run-1_T1w", "run-2_T1w", "FLAIR", "acq-low_T1w"):
        write(tmp_path / f"sub-1/anat/sub-1_{kind}.nii.gz", image)
    for name in names:
        write(tmp_path / f"sub-1/anat/sub-1_{name}.nii.gz", mask)
    with pytest.raises(LayoutError) as caught:
        listed(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected the lesion masks of a session on one image, found sub-1_{min(names)}.nii.gz and "
        f"sub-1_{max(names)}.nii.gz, whose names speak of two"
    )


def test_masks_of_one_image_are_joined(tmp_path):
    image, mask = head(1, (8, 9, 7))
    for subject in "12":
        folder = tmp_path / f"sub-{subject}/anat"
        write(folder / f"sub-{subject}_run-1_T1w.nii.gz", image)
        for side in "LR":
            write(folder / f"sub-{subject}_run-1_label-{side}_desc-lesion_mask.nii.gz", mask)
    assert [len(case.masks) for case in listed(tmp_path, folds=2).cases] == [2, 2]


def test_a_session_without_masks_has_one_image_of_a_kind(tmp_path):
    image, mask = head(1, (8, 9, 7))
    for subject in "12":
        write(tmp_path / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz", image)
        write(tmp_path / f"sub-{subject}/anat/sub-{subject}_label-lesion_mask.nii.gz", mask)
    for kind in ("run-1_T1w", "run-1_FLAIR", "run-2_FLAIR"):
        write(tmp_path / f"sub-3/anat/sub-3_{kind}.nii.gz", image)
    assert len(listed(tmp_path, folds=2).cases) == 3  # no other case has a FLAIR, so that two do not matter
    write(tmp_path / "sub-3/anat/sub-3_run-2_T1w.nii.gz", image)
    with pytest.raises(LayoutError, match=r"one T1w of a session without lesion masks, found sub-3_run-1_T1w.* and "):
        listed(tmp_path, folds=2)


def test_bids_without_lesion_masks(tmp_path):
    write(tmp_path / "sub-1/anat/sub-1_T1w.nii.gz", head(1)[0])
    write(tmp_path / "sub-1/anat/sub-1_desc-brain_mask.nii.gz", head(1)[1])
    with pytest.raises(
        LayoutError, match=r"label-lesion_mask\.nii\.gz; found none among 2 files, the first of them sub-1"
    ):
        listed(tmp_path)
