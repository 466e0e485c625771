"""Which cases a training takes: those of a list, of folders, or synthetic ones, and what each command takes of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from layouts import atlas
from pairs import write_case

from grcsf_fast.cli import main, program
from grcsf_fast.cli.listed import chosen_cases
from grcsf_fast.cli.training_cases import SLICES_A_SUBJECT, CaseContents, training_cases
from grcsf_fast.cli.training_options import read_settings
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.datasets.cases_file import read_cases, write_cases
from grcsf_fast.runtime.processes import World
from grcsf_fast.training.synthetic import SEEDS_A_RUN, TRAINING_SEEDS, VALIDATION_SEEDS

PREPROCESSING = Preprocessing((2.0, 2.0, 2.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs of 5 cases, and ATLAS in small with its list: 13 cases in 3 folds, two without a mask."""
    made = tmp_path_factory.mktemp("cases")
    for name in "abcde":
        write_case(made, name)
    assert main(["cases", "atlas-r2", str(atlas(made)), "-o", str(made / "cases.json"), "--folds", "3"]) == 0
    return made


def cases_of(command: str, *given, world: World | None = None):
    options = program._parser().parse_args([command, "-o", "out", *map(str, given)])
    chosen = chosen_cases(options, "images")
    contents = CaseContents(PREPROCESSING, ("image",), masked=command == "train")
    return training_cases(options, read_settings(options), chosen, contents, world or World())


def pairs(folder: Path, *more) -> tuple:
    return ("-i", folder / "images", "-l", folder / "masks", *more)


def named(validation) -> list[str]:
    return [validation.source.names[number] for number in validation.numbers]


def test_the_network_of_synthetic_subjects(capsys):
    """With lesions, few slices of each in 2-D; validated on subjects that no training sees, of every volume."""
    cases = cases_of("train", "--seed", 3)
    source, measured = cases.training, cases.validation.source
    assert source.first_seed == TRAINING_SEEDS + 3 * SEEDS_A_RUN
    assert (source.slices, source.healthy, source.crowded) == (SLICES_A_SUBJECT, False, 0.5)
    assert source.drawn_at == (1.0, 1.5, 2.0)
    assert (measured.first_seed, measured.spread, measured.slices) == (VALIDATION_SEEDS, 6, None)
    assert measured.drawn_at == (1.0,)
    assert list(cases.validation.numbers) == list(range(6))
    assert (cases.described, dict(cases.card), cases.held_out) == ("synthetic subjects with lesions", {}, None)
    assert cases_of("train", "--crop-size", "16,16,16").training.slices is None
    assert capsys.readouterr().out == ""


def test_the_autoencoder_of_synthetic_subjects():
    """Whole subjects with their healthy twins, and no validation."""
    cases = cases_of("train-mae", "--seed", 3)
    source = cases.training
    assert source.first_seed == TRAINING_SEEDS + 3 * SEEDS_A_RUN
    assert (source.slices, source.healthy, source.crowded) == (None, True, 0)
    assert source.drawn_at == (1.0, 1.5, 2.0)
    assert cases.described == "synthetic subjects, drawn without their lesions"
    assert (list(cases.validation), cases.held_out) == ([], None)


def test_each_process_validates_its_share():
    shares = [cases_of("train", "--validation", 5, world=World(rank, 2)).validation.numbers for rank in range(2)]
    assert [list(share) for share in shares] == [[0, 2, 4], [1, 3]]


def test_a_network_of_folders_holds_some_out_by_chance(folder, capsys):
    found = []
    for seed in (0, 0, 1, 2):
        cases = cases_of("train", *pairs(folder, "--seed", seed, "--validation", 2))
        assert sorted([*cases.held_out, *cases.training.names]) == list("abcde")
        assert named(cases.validation) == cases.held_out
        assert (cases.card, cases.described) == ({"held_out_number": 2}, "image/mask pairs of a folder")
        assert cases.training.masks is not None
        said = capsys.readouterr().out
        assert said.startswith("5 cases, 5 with lesion, 5 on the networks' grid")
        assert said.endswith(f"2 of 5 cases held out for validation: {', '.join(sorted(cases.held_out))}\n")
        found.append((cases.held_out, cases.training.names))
    assert found[0] == found[1]
    assert len({str(one) for one in found}) == 3


def test_an_autoencoder_of_a_folder_sees_all_of_it(folder, capsys):
    """In an order by chance: of a folder that is larger than what a training sees those of all sites are seen."""
    cases = cases_of("train-mae", "-i", folder / "images")
    assert (sorted(cases.training.names), cases.training.masks) == (list("abcde"), None)
    orders = [cases_of("train-mae", "-i", folder / "images", "--seed", seed).training.names for seed in (0, 1, 2)]
    assert orders[0] == cases.training.names
    assert len(set(map(tuple, orders))) == 3
    assert (cases.described, dict(cases.card), cases.held_out) == ("volumes of a folder", {}, None)
    assert list(cases.validation) == []
    assert capsys.readouterr().out.startswith("5 cases")


def test_a_network_of_a_list_is_validated_on_its_fold(folder, capsys):
    """By all of it or some by chance, in the order of names; without a fold every case with a mask is trained on."""
    listed = ("--cases", folder / "cases.json")
    listing = read_cases(folder / "cases.json")
    held = [case.name for case in listing.cases if case.fold == 1]
    cases = cases_of("train", *listed, "--fold", 1)
    assert sorted(cases.training.names) == sorted(case.name for case in listing.cases if case.fold in (0, 2))
    assert f"fold 1 holds {len(held)} of them out\n" in capsys.readouterr().out
    assert named(cases.validation) == held
    card = {"cases": {"folds_sha256": listing.folds_sha256, "held_out": 1}}
    assert (cases.described, cases.card, cases.held_out) == ("cases of a list", card, None)
    few = named(cases_of("train", *listed, "--fold", 1, "--validation", 2).validation)
    assert few == [name for name in held if name in few]
    assert len(few) == 2
    write_cases(folder / "turned.json", replace(listing, cases=listing.cases[::-1]))
    turned = cases_of("train", "--cases", folder / "turned.json", "--fold", 1, "--validation", 2)
    assert (turned.training.names, named(turned.validation)) == (cases.training.names, few)
    whole = cases_of("train", *listed)
    assert sorted(whole.training.names) == sorted(case.name for case in listing.cases if case.masks)
    assert list(whole.validation) == []


def test_an_autoencoder_of_a_list_leaves_a_fold_out(folder, capsys):
    """And is not validated; without a fold it sees cases without a mask too."""
    listed = ("--cases", folder / "cases.json")
    listing = read_cases(folder / "cases.json")
    cases = cases_of("train-mae", *listed, "--fold", 1)
    assert sorted(cases.training.names) == sorted(case.name for case in listing.cases if case.fold in (0, 2))
    assert "13 cases; fold 1 holds" in capsys.readouterr().out
    assert cases.described == "volumes of a list of cases"
    assert cases.card["cases"]["held_out"] == 1
    assert (list(cases.validation), cases.held_out) == ([], None)
    assert len(cases_of("train-mae", *listed).training.names) == len(listing.cases) == 15
    other = cases_of("train-mae", *listed, "--fold", 1, "--seed", 1)
    assert sorted(other.training.names) == sorted(cases.training.names)
    assert other.training.names != cases.training.names
