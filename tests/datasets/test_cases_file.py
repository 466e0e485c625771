"""The list of cases on disk, and its folds."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from layouts import atlas, decathlon, head, write

from grcsf_fast.data.images import OneChannel
from grcsf_fast.datasets.cases_file import (
    CaseList,
    CasesError,
    ListedCase,
    images_of,
    only_image,
    read_cases,
    select,
    write_cases,
)
from grcsf_fast.datasets.folds import hold_out, with_folds, with_splits
from grcsf_fast.datasets.layouts import list_cases_of
from grcsf_fast.errors import ArgumentError


def case(number, volume, site=None, subject=None, masks=(Path("m.nii.gz"),)):
    subject = subject or f"s{number}"
    return ListedCase(f"c{number:03d}", (Path("i.nii.gz"),), masks, subject, site, volume)


def test_a_list_is_read_as_it_was_written(tmp_path):
    listing, _ = list_cases_of("decathlon", [decathlon(tmp_path)], labels=[1, 2])
    write_cases(tmp_path / "cases.json", listing)
    assert read_cases(tmp_path / "cases.json") == listing
    first = json.loads((tmp_path / "cases.json").read_text())["cases"][0]
    assert first["images"][1] == {"file": "Task01_BrainTumour/imagesTr/BRATS_001.nii.gz", "channel": 1}
    assert first["masks"] == ["Task01_BrainTumour/labelsTr/BRATS_001.nii.gz"]


def test_files_below_the_list_move_with_it(tmp_path, monkeypatch):
    root = tmp_path / "here"
    listing, _ = list_cases_of("atlas-r2", [atlas(root)])
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(root)
    write_cases("cases.json", listing)
    write_cases(tmp_path / "lists" / "cases.json", listing)
    assert read_cases("cases.json") == listing
    moved = root.rename(tmp_path / "there")
    found = read_cases(moved / "cases.json").cases[0]
    assert found.images[0].is_file()
    assert found.images[0].is_relative_to(moved)
    assert not read_cases(tmp_path / "lists" / "cases.json").cases[0].images[0].exists()


def test_volumes_of_lesions_of_small_animals(tmp_path):
    affine = np.diag([0.05, 0.05, 0.05, 1])
    for number in range(1, 5):
        image, mask = head(number, (8, 9, 7), number)
        write(tmp_path / "images" / f"{number}.nii.gz", image, affine)
        write(tmp_path / "masks" / f"{number}.nii.gz", mask, affine)
    listing = list_cases_of("pairs", [tmp_path / "images", tmp_path / "masks"], folds=2)[0]
    assert [case.lesion_ml for case in listing.cases] == [1.25e-07, 1e-06, 3.375e-06, 8e-06]
    assert [sum(case.fold == fold and case.lesion_ml > 2e-06 for case in listing.cases) for fold in (0, 1)] == [1, 1]


def test_names_that_are_no_utf8(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    listing = CaseList("pairs", (ListedCase(name, (tmp_path / f"{name}.nii",), (), name),))
    write_cases(tmp_path / "cases.json", listing)
    assert read_cases(tmp_path / "cases.json") == listing


def whole():
    return {
        "format": "grcsf-fast cases", "version": 1, "layout": "pairs", "channels": ["image"], "label_names": {},
        "labels": None, "above_hu": None, "folds": 2, "seed": 0,
        "cases": [
            {"name": "a", "images": [{"file": "a.nii"}], "masks": ["m.nii"], "fold": 0, "subject": "a", "site": None,
             "lesion_ml": 1.0},
        ],
    }  # fmt: skip


def changed(**changes):
    text = whole()
    text["cases"][0] |= changes
    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], 'expected a list of cases with "format": "grcsf-fast cases", found other JSON'),
        (whole() | {"version": 2}, "expected version 1 of the list of cases, found 2"),
        (whole() | {"cases": []}, 'expected a list of at least one case under "cases", found []'),
        (whole() | {"cases": [3]}, 'case 0: expected an object with "name", found 3'),
        (whole() | {"labels": [0]}, 'expected whole numbers above 0 or null under "labels", found [0]'),
        (whole() | {"cases": [changed()["cases"][0]] * 2}, "expected every case once, found a several times"),
        (
            whole() | {"cases": [changed()["cases"][0] | {"name": f"a{fold}", "fold": fold} for fold in (2, 0)]},
            "expected the cases of subject a in one fold, found them in 0, 2",
        ),
        (changed(name="../a"), "case 0: expected a name that a file can have, found '../a'"),
        (changed(name=".a"), "expected a name that a file can have"),
        (changed(images=[]), "case 0 (a): expected at least one image, found none"),
        (changed(images=["a.nii"]), 'case 0 (a): expected an object with "file", found "a.nii"'),
        (changed(images=[{"file": "a", "channel": "x"}]), 'expected int under "channel", found "x"'),
        (changed(masks=[1]), 'case 0 (a): expected file names under "masks", found [1]'),
        (changed(masks=[]), "case 0 (a): expected a mask, as it is in fold 0, found none"),
        (changed(test=1), 'case 0 (a): expected true or false under "test", found 1'),
        (changed(test=True), "case 0 (a): expected no fold, as it is of a test set, found 0"),
        (changed(fold="0"), 'case 0 (a): expected int or null under "fold", found "0"'),
        (changed(fold=True), 'expected int or null under "fold", found true'),
        (changed(fold=-1), 'case 0 (a): expected a number from 0 or null under "fold", found -1'),
        *(
            (whole() | {"label_names": names}, f'expected {{"1": "name", ...}} under "label_names", found {shown}')
            for names, shown in ((None, "null"), (["core"], '["core"]'), ({"core": 1}, '{"core": 1}'))
        ),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(text))
    with pytest.raises(CasesError) as caught:
        read_cases(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_no_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a list that `grcsf-fast cases` wrote, found none"):
        read_cases(tmp_path / "cases.json")
    (tmp_path / "cases.json").write_text("{")
    with pytest.raises(CasesError, match="expected JSON, could not read it"):
        read_cases(tmp_path / "cases.json")


def test_folds_hold_subjects_whole():
    cases = tuple(case(number, 1.0, subject=f"s{number // 3}") for number in range(60))
    folds = {one.subject: set() for one in cases}
    for one in with_folds(CaseList("pairs", cases)).cases:
        folds[one.subject].add(one.fold)
    assert all(len(found) == 1 for found in folds.values())
    assert Counter(next(iter(found)) for found in folds.values()) == dict.fromkeys(range(5), 4)


def test_folds_are_alike_in_volume_and_site():
    """40 subjects of each of two sites, and a small one: a quarter without lesion, the others small or large."""
    volumes = [0, 1, 20, 2] * 20 + [0, 30, 1]
    sites = ["A"] * 40 + ["B"] * 40 + ["C"] * 3
    cases = tuple(case(number, *both) for number, both in enumerate(zip(volumes, sites, strict=True)))
    for seed in range(5):
        found = with_folds(CaseList("pairs", cases), seed=seed).cases
        for kind in (
            lambda one: one.lesion_ml == 0,
            lambda one: 0 < one.lesion_ml <= 2,
            lambda one: one.lesion_ml > 2,
            lambda one: one.site == "A",
            lambda one: one.site == "B",
            lambda one: one.site == "B" and one.lesion_ml == 20,
            lambda one: True,
        ):
            counts = [sum(kind(one) for one in found if one.fold == fold) for fold in range(5)]
            assert max(counts) - min(counts) <= 1


def splits(path, *folds):
    path.write_text(json.dumps([{"train": [], "val": list(names)} for names in folds]))
    return path


def test_folds_of_nnunet(tmp_path):
    cases = (case(0, 1.0), case(1, 0.0), case(2, 2.0), case(3, 0.0, masks=()))
    listing = with_splits(CaseList("nnunet", cases), splits(tmp_path / "splits_final.json", ["c002"], ["c000", "c001"]))
    assert [one.fold for one in listing.cases] == [1, 1, 0, None]
    write_cases(tmp_path / "cases.json", listing)
    read = read_cases(tmp_path / "cases.json")
    assert (read.folds, read.seed) == (2, None)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([["c000"]], 'expected every case with a mask once under "val", found c001 0 times and 1 more so'),
        ([["c000", "c001"], ["c000", "c002"]], "found c000 2 times"),
        ([["c000", "d"], ["c001", "c002"]], "found d, which is none"),
        ([["c000", "c001"], ["c002"]], "the cases of subject s in one fold, found them in 0, 1"),
    ],
)
def test_folds_of_nnunet_that_do_not_fit(tmp_path, folds, message):
    listing = CaseList("nnunet", (case(0, 1.0), case(1, 0.0, subject="s"), case(2, 2.0, subject="s")))
    path = splits(tmp_path / "splits_final.json", *folds)
    with pytest.raises(CasesError, match=f"^{re.escape(str(path))}: .*{message}"):
        with_splits(listing, path)


def test_folds_of_nnunet_need_its_file(tmp_path):
    listing, path = CaseList("nnunet", (case(0, 1.0),)), tmp_path / "splits_final.json"
    with pytest.raises(FileNotFoundError, match=r"expected a splits_final\.json of nnU-Net, found none"):
        with_splits(listing, path)
    for text in ('[["c000"]]', "[", '[{"train": ["c000"]}]'):
        path.write_text(text)
        with pytest.raises(CasesError, match="found other content"):
            with_splits(listing, path)


def test_folds_by_seed():
    cases = tuple(case(number, float(number % 7)) for number in range(50))
    one, again, other = (with_folds(CaseList("pairs", cases), 5, seed) for seed in (3, 3, 4))
    assert one == again
    assert one.seed == 3
    assert [found.fold for found in one.cases] != [found.fold for found in other.cases]


def test_a_draw_does_not_depend_on_the_order_of_the_list():
    cases = tuple(case(number, float(number % 7)) for number in range(20))
    folds = [
        {one.name: one.fold for one in with_folds(CaseList("pairs", order)).cases} for order in (cases, cases[::-1])
    ]
    assert folds[0] == folds[1]


def test_cases_without_masks_have_no_fold():
    cases = (*(case(number, 1.0) for number in range(5)), case(5, None, masks=()))
    found = with_folds(CaseList("pairs", cases))
    assert found.cases[5].fold is None
    assert with_folds(CaseList("pairs", cases[5:])).folds == 0
    assert [one.name for one in select(found, "test")] == ["c005"]
    assert len(select(found, None)) == 6
    assert len(select(found, 3)) == 1
    with pytest.raises(ArgumentError, match="--fold: expected a fold of the list, 0, 1, 2, 3, 4, test, got 7"):
        select(found, 7)


def test_subjects_are_held_out_whole():
    names = ["sub-3_ses-1", "sub-1_ses-1", "c", "sub-3_ses-2", "sub-1_ses-2", "a"]
    first = ["sub-3_ses-1", "sub-3_ses-2"]
    assert hold_out(names, 1) == hold_out(names, 2) == (first, ["sub-1_ses-1", "c", "sub-1_ses-2", "a"])
    assert hold_out(names, 3) == ([*first, "sub-1_ses-1", "sub-1_ses-2"], ["c", "a"])
    assert hold_out(names, 0) == ([], names)
    assert hold_out(["c", "a", "b"], 1) == (["c"], ["a", "b"])
    assert hold_out(first, 1) == ([], first)  # one subject: it is trained on


def test_several_images_are_refused_for_now():
    images = tuple(OneChannel(Path("x.nii"), place) for place in range(2))
    one = ListedCase("x", images, (), "x")
    with pytest.raises(
        ArgumentError, match=r"x: expected one image, .* found 2 in the list \(T1w, FLAIR\); .*--channel"
    ):
        only_image(one, CaseList("decathlon", (one,), ("T1w", "FLAIR")))


def listed_with(*channels):
    one = ListedCase("x", tuple(Path(f"{name}.nii") for name in channels), (), "x")
    return one, CaseList("nnunet", (one,), channels)


def test_images_are_found_by_name():
    one, listing = listed_with("T1w", "FLAIR")
    assert images_of(one, listing, ("FLAIR", "T1w")).images == (Path("FLAIR.nii"), Path("T1w.nii"))
    assert images_of(one, listing, ("FLAIR",)) == Path("FLAIR.nii")
    assert images_of(*listed_with("T1w"), ("image",)) == Path("T1w.nii")
    assert images_of(*listed_with("image"), ("T1w",)) == Path("image.nii")


@pytest.mark.parametrize(
    ("channels", "listed"),
    [(("FLAIR",), ("T1w",)), (("T1w", "FLAIR"), ("T1w", "T2w")), (("T1w", "FLAIR"), ("image",))],
)
def test_channels_that_the_list_lacks(channels, listed):
    """Another image in a channel's place would be segmented without a word."""
    message = f"^x: expected the channels {', '.join(channels)}, found {', '.join(listed)} in the list$"
    with pytest.raises(ArgumentError, match=message):
        images_of(*listed_with(*listed), channels)
