"""The Dice of a validation: of masks counted by hand, and in the log that of the weights which are kept."""

import errno
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from trainings import CPU, RESIDUAL, rows, run, tiny_mae, tiny_network, training_run

from grcsf_fast import GRCSF, CompensationMaps
from grcsf_fast.cli import main
from grcsf_fast.data.labels import Labels
from grcsf_fast.datasets.cases import Case, Chosen
from grcsf_fast.networks.whole_volume import segment
from grcsf_fast.pretrained.bundle import load_bundle
from grcsf_fast.runtime import transient
from grcsf_fast.training import network as network_module
from grcsf_fast.training.cases import WithMaps
from grcsf_fast.training.network import _dice, train_network
from grcsf_fast.training.sampling import small
from grcsf_fast.training.synthetic import SyntheticSource

SHAPE = (4, 4, 2)


class Told(GRCSF):
    """Its logits are its image."""

    def __init__(self, channels=1):
        super().__init__(2, channels, channels, features=(2, 2), rcu_levels=(), gcu=False)
        self.modes = []

    def forward(self, image, residual_maps=None, return_maps=False):
        self.modes.append(self.training)
        return image, CompensationMaps({}, {}, None)


def per_voxel(counts, rest, dtype=torch.float32):
    """(C, X, Y, Z) of so many voxels of each value, and of those that are left; a value has C numbers."""
    values = [value for count, value in counts for _ in range(count)]
    values += [rest] * (np.prod(SHAPE) - len(values))
    return torch.tensor(values, dtype=dtype).view(len(values), -1).T.reshape(-1, *SHAPE)


@pytest.mark.parametrize(
    ("found", "rest", "lesion", "expected"),
    [
        # Five of the nine found are among the ten; half is found.
        ([(8, 0.9), (1, 0.5), (3, 0.3)], 0.01, [(4, False), (10, True)], 2 * 5 / (9 + 10)),
        ([(8, 0.9)], 0.49, [(8, True)], 1.0),
        ([(8, 0.9)], 0.01, [(8, False), (8, True)], 0.0),
        ([], 0.4, [(8, True)], 0.0),
        ([], 0.4, [], np.nan),
        ([(1, 0.5)], 0.4, [], 0.0),
    ],
)
def test_dice_of_lesion(found, rest, lesion, expected):
    network = Told().train()
    case = Case("a", per_voxel(found, rest).logit()[0], per_voxel(lesion, False, torch.bool)[0])
    assert _dice(network, case, CPU, None, None) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert network.training
    assert network.modes == [False]


def test_dice_is_cut_where_predictions_are():
    """Of sixteen voxels found eight are dense enough, four of them in the lesion of eight."""
    dense = per_voxel([(8, True)], False, torch.bool)[0]
    found, lesion = per_voxel([(16, 0.9)], 0.1).logit()[0], per_voxel([(4, True)], False, torch.bool)[0]
    assert _dice(Told(), Case("a", found, lesion, dense=dense), CPU, None, None) == 2 * 4 / (8 + 4)
    labels = Labels(("a", "b"), ((1,), (2,)), exclusive=False)
    both = per_voxel([(8, (0.1, 0.9)), (8, (0.9, 0.1))], (0.1, 0.1)).logit()
    numbers = per_voxel([(4, 2)], 0, torch.uint8)[0]
    assert _dice(Told(2), Case("a", both, numbers, dense=dense), CPU, None, labels) == 2 * 4 / (8 + 4)


def test_dice_leaves_out_what_nobody_annotated():
    """As if the voxels were not there: of the eight that are left four are right, and the label 2 is nowhere."""
    ignored = per_voxel([(8, True), (24, False)], False, torch.bool)[0]
    found, lesion = per_voxel([(16, 0.9)], 0.1).logit()[0], per_voxel([(8, False), (4, True)], False, torch.bool)[0]
    assert _dice(Told(), Case("a", found, lesion, ignored=ignored), CPU, None, None) == 2 * 4 / (8 + 4)
    labels = Labels(("a", "b"), ((1,), (2,)), exclusive=False)
    both = per_voxel([(8, (0.1, 0.9)), (8, (0.9, 0.1))], (0.1, 0.1)).logit()
    numbers = per_voxel([(8, 2), (4, 1)], 0, torch.uint8)[0]
    assert _dice(Told(2), Case("a", both, numbers, ignored=ignored), CPU, None, labels) == 2 * 4 / (8 + 4)


# Names, numbers, whether they exclude each other; probabilities and truth; Dice of each.
LABELS = [
    (
        Labels(("a", "b"), ((1,), (4,))),
        # Where there is any, though neither reaches half; and where there is none.
        [(6, (0.2, 0.7, 0.1)), (2, (0.4, 0.35, 0.25)), (4, (0.1, 0.2, 0.7))], (0.6, 0.3, 0.1),
        [(3, 0), (7, 1), (4, 4)],
        (2 * 5 / (8 + 7), 2 * 2 / (4 + 4)),
    ),
    (
        Labels(("whole", "core"), ((1, 4), (4,)), exclusive=False),
        [(6, (0.9, 0.1)), (4, (0.9, 0.8))], (0.3, 0.2),
        [(4, 0), (4, 1), (4, 4)],
        (2 * 6 / (10 + 8), 2 * 2 / (4 + 4)),
    ),
    (
        # A label that is not there and was not found says nothing; one that was invented counts as 0.
        Labels(("a", "b", "c"), ((1,), (4,), (5,))),
        [(6, (0.1, 0.7, 0.1, 0.1)), (2, (0.1, 0.1, 0.1, 0.7))], (0.6, 0.2, 0.1, 0.1),
        [(3, 0), (7, 1)],
        (2 * 3 / (6 + 7), 0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("labels", "found", "rest", "lesion", "expected"), LABELS)
def test_dice_of_labels_is_the_mean_of_theirs(labels, found, rest, lesion, expected):
    probability = per_voxel(found, rest)
    image = probability.log() if labels.exclusive else probability.logit()
    case = Case("a", image, per_voxel(lesion, 0, torch.uint8)[0])
    assert _dice(Told(labels.outputs), case, CPU, None, labels) == pytest.approx(np.mean(expected), rel=1e-12)


def test_healthy_cases_do_not_make_the_network_that_finds_nothing_the_best(tmp_path, monkeypatch):
    """Of one case with lesion and two without: nothing is found at first, and much later on, also where nothing is."""
    figures = iter([0.0, np.nan, np.nan, 0.8, 0.0, np.nan, 1.0, np.nan, np.nan])
    monkeypatch.setattr("grcsf_fast.training.network._dice", lambda *arguments: next(figures))
    cases = [Noise()[number] for number in range(3)]
    run("network", tmp_path, source=Noise(), validation=cases, steps=3, validate_every=1)
    assert [float(row["validation_dice"]) for row in rows(tmp_path)] == [0, 0.4, 1]
    assert load_bundle(tmp_path / "best").card["weights"]["step"] == 3


@pytest.mark.parametrize("labels", [None, Labels(("a",), ((1,),))])
@pytest.mark.parametrize("ignoring", [False, True])
def test_without_lesion_in_any_case_there_is_no_figure(tmp_path, recwarn, labels, ignoring):
    """Neither 1 for nothing found nor 0 for lesion invented, which would choose weights by chance; said once."""
    lesion = torch.zeros(16, 20, 6, dtype=torch.uint8 if labels else torch.bool)
    ignored = torch.zeros_like(lesion, dtype=torch.bool)
    if ignoring:  # the one that there is, nobody annotated
        lesion[3:5, 4:6, 2], ignored[3:5, 4:6, 2] = 1, True
    if labels:
        lesion[8, 8, 3] = 2  # of no label
    cases = [Case(str(number), Noise()[number].image, lesion, ignored=ignored) for number in range(2)]
    network = tiny_network(out_channels=labels.outputs) if labels else tiny_network()
    settings = training_run(tmp_path, steps=4, validate_every=1, log_every=2)
    train_network(network, tiny_mae(), Noise(), cases, replace(settings, labels=labels))
    said = [str(one.message) for one in recwarn if "validation" in str(one.message)]
    assert said == ["validation: none of the 2 cases has lesion: there is no Dice, and the last weights alone are kept"]
    assert [(row["step"], row["validation_dice"], row["validation_dice_median"]) for row in rows(tmp_path)] == [
        ("2", "", ""), ("4", "", "")
    ]  # fmt: skip
    assert not (tmp_path / "best").exists()
    assert load_bundle(tmp_path / "bundle").card["weights"]["chosen"] == "the last step"


class Noise:
    """The higher a case's number, the less of it is lesion."""

    def __getitem__(self, index):
        image = torch.randn(16, 20, 6, generator=torch.Generator().manual_seed(index))
        return Case(str(index), image, image > 0.5 * index)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_logged_figures_are_those_of_the_best_weights(tmp_path, ema):
    """Of a moving average too: it is what is validated, and what is kept."""
    cases = [Noise()[number] for number in range(3)]
    run("network", tmp_path, source=Noise(), validation=cases, steps=3, validate_every=1, ema=ema)
    best = load_bundle(tmp_path / "best")
    dice = []
    for case in cases:
        case = small(WithMaps(best.mae, asdict(RESIDUAL), CPU)(case))
        found = segment(best.network.eval(), case.image, case.residual_maps.float()).numpy() >= 0.5
        lesion = case.lesion.numpy()
        dice.append(2 * (found & lesion).sum() / (found.sum() + lesion.sum()))
    log = rows(tmp_path)
    row = log[best.card["weights"]["step"] - 1]
    assert float(row["validation_dice"]) == pytest.approx(np.mean(dice), rel=1e-5)
    assert float(row["validation_dice_median"]) == pytest.approx(np.median(dice), rel=1e-5)
    assert float(row["validation_dice"]) == max(float(one["validation_dice"]) for one in log)
    assert len({one["validation_dice"] for one in log}) > 1


class Counted(Noise):
    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


# Bytes of a case of Noise: image, lesion and two maps of half precision.
SIZE = 16 * 20 * 6 * (4 + 1 + 2 * 2)


@pytest.mark.parametrize(
    ("left", "read"),
    [
        (3 * SIZE, [4, 6, 5]),
        (3 * SIZE - 1, [4, 6, 5, 5, 5]),
        pytest.param(SIZE, [4, 6, 5, 6, 5, 6, 5], marks=pytest.mark.slow),
        pytest.param(SIZE - 1, [4, 6, 5] * 3, marks=pytest.mark.slow),
        (0, [4, 6, 5] * 3),
    ],
)
def test_validation_cases_that_do_not_fit_are_made_again(tmp_path, monkeypatch, left, read):
    """In a quarter of the memory; with their maps, and to the same figures."""
    expected = [Noise()[number] for number in (4, 6, 5)]
    run("network", tmp_path / "list", source=Noise(), validation=expected, steps=3, validate_every=1)
    monkeypatch.setattr("grcsf_fast.training.cases.memory_budget", lambda: 4 * left)
    made, real = [], WithMaps.__call__
    monkeypatch.setattr(WithMaps, "__call__", lambda self, case: made.append(case.name) or real(self, case))
    source = Counted()
    run("network", tmp_path / "read", source=Noise(), validation=Chosen(source, [4, 6, 5]), steps=3, validate_every=1)
    assert source.read == read
    assert [int(name) for name in made if int(name) in (4, 6, 5)] == read
    logs = [[row | {"seconds": ""} for row in rows(tmp_path / name)] for name in ("list", "read")]
    assert logs[0] == logs[1]
    assert len({row["validation_dice"] for row in logs[0]}) > 1


def test_a_case_that_cannot_be_read_for_a_moment_ends_no_training(tmp_path, monkeypatch):
    """As none to train on does: a network's file system may refuse it in any validation."""
    monkeypatch.setattr(transient, "PAUSES", (0.0,))
    stale = [OSError(errno.ESTALE, os.strerror(errno.ESTALE), "scan.nii.gz")]

    class Stale(Noise):
        def __getitem__(self, index):
            if stale:
                raise stale.pop()
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match=r"^validation case 1: .*'scan\.nii\.gz'; is tried again in 0 s$"):
        run("network", tmp_path, source=Noise(), validation=Chosen(Stale(), [4]), steps=1)
    assert rows(tmp_path)[-1]["validation_dice"]


def test_the_command_leaves_its_validation_cases_to_be_read_one_by_one(tmp_path, monkeypatch):
    seen, read = [], []
    monkeypatch.setattr(network_module, "train_network", lambda *arguments: seen.append(arguments) or tmp_path)
    monkeypatch.setattr(SyntheticSource, "__getitem__", lambda self, index: read.append(index) or index)
    assert main(["train", "-o", str(tmp_path), "--rcu-levels", "", "--validation", "3", "--device", "cpu"]) == 0
    assert read == []
    assert list(seen[0][3]) == read == [0, 1, 2]


def test_chosen_cases_are_a_sequence():
    chosen = Chosen(["a", "b", "c", "d"], [3, 0, 1])
    assert list(chosen) == ["d", "a", "b"]
    assert chosen[-1] == "b"
    assert list(chosen[1:]) == ["a", "b"]
    assert not Chosen([], [])
