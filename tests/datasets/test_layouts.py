"""Data sets as they lie on disk: what is found in them, and what is said where something else lies there."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from layouts import AFFINE, MNI, atlas, atlas_session, decathlon, head, nnunet, orcascore, write
from metaimages import write_metaimage
from pairs import SHAPE, write_case

from grcsf_fast.cli import main
from grcsf_fast.data.images import OneChannel
from grcsf_fast.data.masks import load_masks
from grcsf_fast.data.volumes import VolumeError, load_volume
from grcsf_fast.datasets.cases_file import CasesError, read_cases, select, write_cases
from grcsf_fast.datasets.folders import LayoutError
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.datasets.lesions import load_ignored, load_lesion
from grcsf_fast.errors import ArgumentError


def listed(layout, *roots, **choices):
    return list_cases_of(layout, roots, **choices)[0]


def by_name(listing):
    return {case.name: case for case in listing.cases}


def test_atlas(tmp_path):
    root = atlas(tmp_path)
    listing = listed("atlas-r2", root)
    assert (listing.layout, listing.channels, len(listing.cases)) == ("atlas-r2", ("T1w",), 15)
    case = by_name(listing)["sub-r002s003_ses-2"]
    folder = root / "Training/R002/sub-r002s003/ses-2/anat"
    assert case.images == (folder / f"sub-r002s003_ses-2_{MNI}_T1w.nii.gz",)
    assert case.masks == (folder / f"sub-r002s003_ses-2_{MNI}_label-L_desc-T1lesion_mask.nii.gz",)
    assert (case.subject, case.site) == ("sub-r002s003", "R002")
    assert case.lesion_ml == pytest.approx(4**3 * 0.008)
    assert by_name(listing)["sub-r001s001_ses-1"].lesion_ml == 0
    hidden = by_name(listing)["sub-r002s007_ses-1"]
    assert (hidden.masks, hidden.fold, hidden.lesion_ml) == ((), None, None)


@pytest.mark.parametrize("part", ["", "Training", "Training/R001", "Testing"])
def test_parts_of_atlas(tmp_path, part):
    counts = {"": 15, "Training": 13, "Training/R001": 6, "Testing": 2}
    assert len(listed("atlas-r2", atlas(tmp_path) / part).cases) == counts[part]


def test_only_folders_of_atlas_say_what_is_its_test_set(tmp_path):
    """Not those that the data set lies in; a site's folder may be of the test set."""
    root = atlas(tmp_path / "testing")
    assert len(listed("atlas-r2", root / "Testing" / "R002").cases) == 2
    next(root.glob("Training/R001/sub-r001s002/**/*mask.nii.gz")).unlink()
    for part in (".", "Training", "Training/R001"):
        with pytest.raises(LayoutError, match=r"but not one for sub-r001s002_ses-1_.*_T1w"):
            listed("atlas-r2", root / part)


def test_masks_of_a_session_are_joined(tmp_path):
    folder = atlas_session(tmp_path, 1, 1)
    _, other = head(0, (14, 15, 10), 2)
    right = folder / f"sub-r001s001_ses-1_{MNI}_label-R_desc-T1lesion_mask.nii.gz"
    write(right, other)
    for subject in (2, 3):
        atlas_session(tmp_path, 1, subject)
    listing = listed("atlas-r2", tmp_path, folds=3)
    case = by_name(listing)["sub-r001s001_ses-1"]
    assert len(case.masks) == 2
    assert case.lesion_ml == pytest.approx((4**3 + 2**3) * 0.008)
    mask = load_lesion(case, listing)
    assert mask.voxels[14:16, 15:17, 10:12].all()
    assert mask.voxels[8:12, 9:13, 7:11].all()
    assert mask.voxels.sum() == 72
    write(right, other, np.diag([2, 2, 2, 1.0]))
    said = r"of 1 of 3 cases cannot be used:\n.*label-R.*expected the grid of .*_T1w\.nii\.gz"
    with pytest.raises(CasesError, match=said):
        listed("atlas-r2", tmp_path, folds=3)


def test_later_releases_of_atlas_and_two_spaces(tmp_path):
    folder = atlas_session(tmp_path, 1, 1)
    image, mask = head(5, (8, 9, 7), 3)
    write(folder / "sub-r001s001_ses-1_space-orig_desc-brain_T1w.nii.gz", image)
    write(folder / "sub-r001s001_ses-1_space-orig_label-lesion_desc-T1lesion_mask.nii.gz", mask)
    atlas_session(tmp_path, 1, 2)
    found = by_name(listed("atlas-r2", tmp_path, folds=2))
    own = found["sub-r001s001_ses-1_space-orig"]
    assert [path.name for path in own.masks] == ["sub-r001s001_ses-1_space-orig_label-lesion_desc-T1lesion_mask.nii.gz"]
    assert own.fold == found["sub-r001s001_ses-1_space-MNI152NLin2009aSym"].fold
    assert len(found) == 3


def test_atlas_without_some_masks(tmp_path):
    root = atlas(tmp_path)
    for subject in (2, 4, 5):
        next(root.glob(f"Training/R001/sub-r001s00{subject}/**/*mask.nii.gz")).unlink()
    with pytest.raises(LayoutError) as caught:
        listed("atlas-r2", root)
    assert str(caught.value) == (
        f"{root}: expected a *_label-L_desc-T1lesion_mask.nii.gz beside every T1w image; "
        f"found sub-r001s001_ses-1_{MNI}_label-L_desc-T1lesion_mask.nii.gz, "
        f"but not one for sub-r001s002_ses-1_{MNI}_T1w.nii.gz and 2 more"
    )


def test_decathlon(tmp_path):
    root = decathlon(tmp_path)
    listing = listed("decathlon", root)
    assert listing.channels == ("FLAIR", "T1w", "t1gd", "T2w")
    assert listing.label_names == {1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumour"}
    assert [case.name for case in listing.cases] == [f"BRATS_00{number}" for number in range(1, 9)]
    case = listing.cases[0]
    assert case.images == tuple(OneChannel(root / "imagesTr/BRATS_001.nii.gz", place) for place in range(4))
    assert case.lesion_ml == pytest.approx(64 * 0.008)
    assert [case.masks for case in listing.cases[6:]] == [(), ()]
    assert {case.fold for case in listing.cases} == {0, 1, 2, 3, 4, None}


def test_decathlon_with_one_modality(tmp_path):
    root = decathlon(tmp_path, channels=1)
    assert listed("decathlon", root).cases[0].images == (root / "imagesTr/BRATS_001.nii.gz",)


def test_a_channel_of_a_file(tmp_path):
    root = decathlon(tmp_path)
    listing = listed("decathlon", root, channel=2)
    assert listing.channels == ("t1gd",)
    (image,) = listing.cases[0].images
    stack = np.asarray(nib.load(root / "imagesTr/BRATS_001.nii.gz").dataobj)
    volume = load_volume(image)
    assert np.array_equal(volume.data, stack[..., 2])
    assert np.array_equal(volume.affine, AFFINE)
    with pytest.raises(VolumeError, match=r"BRATS_001\.nii\.gz \(channel 4\): expected a file with this channel"):
        load_volume(OneChannel(image.path, 4))
    content = image.path.read_bytes()
    image.path.write_bytes(content[:-20])
    with pytest.raises(VolumeError, match="channel 2"):
        load_volume(image)
    with pytest.raises(ArgumentError, match="--channel: expected one of 0 FLAIR, 1 T1w, 2 t1gd, 3 T2w, got 4"):
        listed("decathlon", root, channel=4)


def test_labels_that_are_lesion(tmp_path):
    root = decathlon(tmp_path)
    listing, values = list_cases_of("decathlon", [root], labels=[1, 3])
    assert (listing.labels, values) == ((1, 3), (1.0, 2.0, 3.0))
    assert listing.cases[0].lesion_ml == pytest.approx(63 * 0.008)
    assert load_lesion(listing.cases[0], listing).voxels.sum() == 63
    assert load_masks(listing.cases[0].masks, labels=[3]).voxels.sum() == 1
    with pytest.raises(ArgumentError, match="--labels: expected values of the masks, which are 1, 2, 3, got 4"):
        listed("decathlon", root, labels=[1, 4])


def test_decathlon_without_some_files(tmp_path):
    root = decathlon(tmp_path)
    for name in ("imagesTr/BRATS_003.nii.gz", "labelsTr/BRATS_004.nii.gz"):
        (root / name).unlink()
    with pytest.raises(LayoutError) as caught:
        listed("decathlon", root)
    assert str(caught.value) == (
        f"{root}: expected the files that dataset.json lists; found imagesTr/BRATS_001.nii.gz, "
        "but not imagesTr/BRATS_003.nii.gz and 1 more"
    )


def test_nnunet(tmp_path):
    root = nnunet(tmp_path)
    listing = listed("nnunet", root)
    assert listing.channels == ("T2", "ADC")
    assert listing.label_names == {1: "PZ", 2: "TZ"}
    case = by_name(listing)["prostate_02"]
    assert case.images == tuple(root / f"imagesTr/prostate_02_000{place}.nii.gz" for place in range(2))
    assert case.masks == (root / "labelsTr/prostate_02.nii.gz",)
    assert by_name(listing)["prostate_05"].masks == ()


def test_a_test_set_of_nnunet_with_masks_has_no_fold(tmp_path):
    root = nnunet(tmp_path)
    write(root / "labelsTs" / "prostate_05.nii.gz", head(5, (8, 9, 7))[1])
    listing = listed("nnunet", root)
    case = by_name(listing)["prostate_05"]
    assert (case.masks, case.fold, case.test) == ((root / "labelsTs/prostate_05.nii.gz",), None, True)
    assert case.lesion_ml == pytest.approx(64 * 0.008)
    assert sorted(one.fold for one in listing.cases if not one.test) == [0, 1, 2, 3, 4]
    write_cases(tmp_path / "cases.json", listing)
    assert read_cases(tmp_path / "cases.json") == listing


def test_nnunet_with_its_own_folds(tmp_path, capsys):
    root, splits, output = nnunet(tmp_path), tmp_path / "splits_final.json", tmp_path / "cases.json"
    folds = [["prostate_03", "prostate_00"], ["prostate_01", "prostate_02", "prostate_04"]]
    splits.write_text(json.dumps([{"train": [], "val": names} for names in folds]))
    assert main(["cases", "nnunet", str(root), "-o", str(output), "--splits", str(splits)]) == 0
    assert [[case.name for case in select(read_cases(output), fold)] for fold in (0, 1)] == [sorted(folds[0]), folds[1]]
    for drawn in (["--seed", "0"], ["--folds", "5"]):
        assert main(["cases", "nnunet", str(root), "-o", str(output), "--splits", str(splits), *drawn]) == 2
        assert f"{drawn[0]}: " in capsys.readouterr().err


def test_nnunet_of_version_1(tmp_path):
    old = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ", "2": "TZ"}}
    root = nnunet(tmp_path, channel_names=None, file_ending=None, **old)
    listing = listed("nnunet", root)
    assert (listing.channels, listing.label_names) == (("T2", "ADC"), {1: "PZ", 2: "TZ"})


def test_nnunet_with_regions_and_an_ignored_label(tmp_path):
    labels = {"background": 0, "whole": [1, 3], "core": [3], "ignore": 2}
    root = nnunet(tmp_path, labels=labels)
    listing = listed("nnunet", root)
    assert listing.label_names == {1: "whole", 2: "ignore", 3: "whole and core"}
    assert (listing.labels, listing.ignored) == ((1, 3), (2,))
    assert listing.cases[0].lesion_ml == pytest.approx(63 * 0.008)
    ignored = load_ignored(listing.cases[0], listing)
    assert ignored is not None
    assert ignored.voxels.nonzero() == ([8], [9], [7])
    with pytest.raises(ArgumentError, match=r"--labels: expected values of lesions, got 2, which .* nobody annotated"):
        listed("nnunet", root, labels=[1, 2])
    assert (narrower := listed("nnunet", root, labels=[1])).labels == (1,)
    assert narrower.ignored == (2,)


def test_nnunet_whose_ignored_label_is_of_a_region_too(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "ignore": 2}
    with pytest.raises(LayoutError, match="expected a number of its own for ignore, found 2 for whole and ignore"):
        listed("nnunet", nnunet(tmp_path, labels=labels))


def test_nnunet_with_a_list_of_files(tmp_path):
    root = nnunet(tmp_path)
    (root / "imagesTr").rename(tmp_path / "elsewhere")
    entries = {
        f"p{number}": {
            "images": [f"../elsewhere/prostate_{number:02d}_000{place}.nii.gz" for place in range(2)],
            "label": f"labelsTr/prostate_{number:02d}.nii.gz",
        }
        for number in range(5)
    }
    text = json.loads((root / "dataset.json").read_text()) | {"dataset": entries}
    (root / "dataset.json").write_text(json.dumps(text))
    listing = listed("nnunet", root)
    assert [case.name for case in listing.cases] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(image.is_file() for case in listing.cases for image in case.images)


def test_nnunet_without_some_files(tmp_path):
    root = nnunet(tmp_path)
    (root / "imagesTr/prostate_01_0001.nii.gz").unlink()
    (root / "labelsTr/prostate_03.nii.gz").unlink()
    with pytest.raises(LayoutError) as caught:
        listed("nnunet", root)
    assert str(caught.value) == (
        f"{root}: expected imagesTr/NAME_0000.nii.gz with labelsTr/NAME.nii.gz; "
        "found imagesTr/prostate_00_0000.nii.gz, but not imagesTr/prostate_01_0001.nii.gz and 1 more"
    )
    (root / "labelsTr/prostate_03.nii.gz").symlink_to("nowhere")
    said = r"; 1 links to nothing, such as labelsTr/prostate_03\.nii\.gz, which may have to be fetched first$"
    with pytest.raises(LayoutError, match=said):
        listed("nnunet", root)


def test_nnunet_with_several_channels_in_a_file(tmp_path):
    root = nnunet(tmp_path)
    write(root / "imagesTr/prostate_01_0000.nii.gz", np.stack([head(1)[0]] * 2, 3))
    for choice in (None, 0):
        with pytest.raises(LayoutError, match=r"_0000\.nii\.gz: .*, found 2 along .*; make a file of each$"):
            listed("nnunet", root, channel=choice)
    assert listed("nnunet", root, channel=1).channels == ("ADC",)


def test_a_task_of_the_decathlon_is_no_data_set_of_nnunet(tmp_path):
    with pytest.raises(LayoutError, match=r"_0000.*found none among .* files, the first of them dataset\.json"):
        listed("nnunet", decathlon(tmp_path))
    with pytest.raises(LayoutError, match=r"expected JSON of the Decathlon, .*, found channel_names, labels, "):
        listed("decathlon", nnunet(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ending": ".png"}, "expected one of .nii.gz, .nii, .mha, .mhd, .nrrd under file_ending, found '.png'"),
        ({"channel_names": None}, 'expected names numbered from 0 under "modality", found None'),
        ({"channel_names": {"1": "T2"}}, 'expected names numbered from 0 under "channel_names"'),
        ({"labels": {"background": "x"}}, 'expected names and values under "labels"'),
    ],
)
def test_dataset_json_of_something_else(tmp_path, changes, message):
    with pytest.raises(LayoutError) as caught:
        listed("nnunet", nnunet(tmp_path, **changes))
    assert message in str(caught.value)
    assert "dataset.json" in str(caught.value)


def test_orcascore(tmp_path):
    root = orcascore(tmp_path)
    listing = listed("orcascore", root)
    assert [case.name for case in listing.cases] == [
        *("TEV1P1", "TRV1P1", "TRV1P2", "TRV1P3", "TRV2P1", "TRV2P2", "TRV2P3"),
    ]
    assert (listing.channels, listing.label_names) == (("CT",), {1: "LAD", 2: "LCX", 3: "RCA"})
    test, case, *_ = listing.cases
    assert (test.masks, test.fold) == ((), None)
    assert case.images == (root / "Training Set/Images/TRV1P1CTI.mhd",)
    assert case.masks == (root / "Training Set/Reference standard/TRV1P1R.mhd",)
    assert (case.subject, case.site) == ("TRV1P1", "V1")


def test_calcium_is_above_130_hounsfield_units(tmp_path):
    """The reference of the look-alike marks 3 voxels of 400 HU per artery, and one of 130 beside each."""
    root = orcascore(tmp_path)
    listing, values = list_cases_of("orcascore", [root])
    case = listing.cases[1]
    assert values == (1.0, 2.0, 3.0)
    assert load_masks(case.masks).voxels.sum() == 12
    assert load_lesion(case, listing).voxels.sum() == 9
    assert case.lesion_ml == pytest.approx(9 * 0.012)
    one = listed("orcascore", root, labels=[3])
    assert load_lesion(one.cases[1], one).voxels.sum() == 3


def test_orcascore_without_some_references(tmp_path):
    root = orcascore(tmp_path)
    for name in ("TRV1P2", "TRV2P1"):
        (root / f"Training Set/Reference standard/{name}R.mhd").unlink()
    with pytest.raises(LayoutError) as caught:
        listed("orcascore", root)
    assert str(caught.value) == (
        f"{root}: expected a reference standard TRV*P*R of every training image; found TRV1P1R.mhd, "
        "but not one for TRV1P2CTI.mhd and 1 more"
    )


def test_names_of_orcascore_in_small_letters_and_nifti(tmp_path):
    image, mask = head(1, (8, 9, 7))
    for number in range(1, 6):
        write(tmp_path / f"trv1p{number}cti.nii.gz", image * 10)
        write(tmp_path / f"trv1p{number}r.nii.gz", mask)
    listing = listed("orcascore", tmp_path)
    assert [case.name for case in listing.cases] == [f"TRV1P{number}" for number in range(1, 6)]


def test_nnunet_with_metaimages(tmp_path):
    image, mask = head(1, (8, 9, 7))
    for number in range(5):
        write_metaimage(tmp_path / f"imagesTr/c{number}_0000.mha", image)
        write_metaimage(tmp_path / f"labelsTr/c{number}.mha", mask)
    text = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".mha"}
    (tmp_path / "dataset.json").write_text(json.dumps(text))
    listing = listed("nnunet", tmp_path)
    assert [case.name for case in listing.cases] == [f"c{number}" for number in range(5)]
    assert listing.cases[0].lesion_ml == pytest.approx(64 * 0.012)


def test_pairs(tmp_path):
    for name in ("sub-1_ses-1", "sub-1_ses-2", "sub-2", "other"):
        write_case(tmp_path, name, "_0000")
    listing = listed("pairs", tmp_path / "images", tmp_path / "masks", folds=3)
    found = by_name(listing)
    assert {name: case.subject for name, case in found.items()} == {
        "sub-1_ses-1": "sub-1",
        "sub-1_ses-2": "sub-1",
        "sub-2": "sub-2",
        "other": "other",
    }
    assert found["sub-1_ses-1"].fold == found["sub-1_ses-2"].fold
    with pytest.raises(ArgumentError, match=r"--folds: expected at most 3, .* \(other, sub-1, sub-2\), got 4"):
        listed("pairs", tmp_path / "images", tmp_path / "masks", folds=4)
    with pytest.raises(ArgumentError, match="pairs: expected IMAGES MASKS, got "):
        listed("pairs", tmp_path / "images")
    with pytest.raises(LayoutError, match="found the images themselves as masks"):
        listed("pairs", tmp_path / "images", tmp_path / "images")
    for name in ("other", "sub-2"):
        (tmp_path / "masks" / f"{name}.nii.gz").unlink()
    with pytest.raises(LayoutError, match=r"found sub-1_ses-1\.nii\.gz, but not other and 1 more"):
        listed("pairs", tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("layout", ["atlas-r2", "bids", "decathlon", "nnunet", "orcascore"])
def test_roots_of_something_else(tmp_path, layout, capsys):
    write_case(tmp_path, "a")
    output = tmp_path / "cases.json"

    def refused(root):
        assert main(["cases", layout, str(root), "-o", str(output)]) == 2
        return capsys.readouterr().err

    assert f"{tmp_path / 'none'}: expected a folder with " in refused(tmp_path / "none")
    said = refused(tmp_path)
    assert "images/a.nii.gz" in said or "found images and 1 more entries, but not dataset.json" in said
    (tmp_path / "dataset.json").write_text("[]")
    if layout in ("decathlon", "nnunet"):
        assert "expected a JSON object of " in refused(tmp_path)
    assert not output.exists()


def test_masks_that_cannot_be_read_are_all_named(tmp_path):
    root = atlas(tmp_path)
    masks = sorted(root.glob("Training/**/*mask.nii.gz"))
    for path in masks:
        path.write_text("text")
    with pytest.raises(CasesError) as caught:
        listed("atlas-r2", root)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the masks of 13 of 15 cases cannot be used:"
    assert [line.strip().split(": ")[0] for line in lines[1:11]] == [str(path) for path in masks[:10]]
    assert lines[11].strip() == "and 3 more"


def test_the_command(tmp_path, capsys):
    root = atlas(tmp_path)
    assert main(["cases", "atlas-r2", str(root), "-o", str(tmp_path / "out" / "cases.json")]) == 0
    said = capsys.readouterr().out
    assert "15 cases of 14 subjects: 11 with lesion, 2 without, 2 without a mask and in no fold" in said
    assert "lesion: 1\n" in said
    assert len(read_cases(tmp_path / "out" / "cases.json").cases) == 15
    assert main(["cases", "decathlon", str(decathlon(tmp_path)), "-o", str(tmp_path / "d.json")]) == 0
    said = capsys.readouterr()
    assert "lesion: 1 edema, 2 non-enhancing tumor, 3 enhancing tumour" in said.out
    assert "images of a case: 0 FLAIR, 1 T1w, 2 t1gd, 3 T2w; the networks take one, which --channel chooses" in said.out
    assert said.err == ""
    assert main(["cases", "atlas-r2", str(root), "-o", str(tmp_path / "cases.txt")]) == 2
    assert "--output: expected the name of a file ending in .json" in capsys.readouterr().err


def test_two_cases_of_one_name(tmp_path):
    atlas_session(tmp_path, 1, 1)
    shutil.copytree(tmp_path / "Training", tmp_path / "copy" / "Training")
    with pytest.raises(CasesError, match=r"found sub-r001s001_ses-1_space-.* several times"):
        listed("atlas-r2", tmp_path)


def test_what_counts_among_chosen_labels(tmp_path):
    """Scale factors and soft masks stand for label 1; nothing is warned of, as somebody has chosen."""
    values = {"scaled": 1 / 255, "one": 1, "two": 2, "all of 255": 255}
    for name, value in values.items():
        data = np.zeros(SHAPE, np.float32)
        data[3:5, 3:5, 3:5] = value
        path = write(tmp_path / f"{name}.nii.gz", data)
        counts = [load_masks([path], labels=labels).voxels.sum() for labels in ([1], [2], [255])]
        assert counts == {"scaled": [8, 0, 0], "one": [8, 0, 0], "two": [0, 8, 0], "all of 255": [0, 0, 8]}[name]
        assert load_masks([path]).voxels.sum() == 8
    data = np.zeros(SHAPE, np.uint8)
    data[3:5, 3, 3], data[5, 3, 3] = 1, 4
    path = write(tmp_path / "several.nii.gz", data)
    assert [load_masks([path], labels=labels).voxels.sum() for labels in ([1], [4], [2])] == [2, 1, 0]
    assert load_masks([path]).labels == (1.0, 4.0)
