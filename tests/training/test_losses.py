"""The loss: the numbers of its parts, patches of any size, and what it refuses."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceFocalLoss, DiceLoss, FocalLoss
from small import network
from torch._subclasses import FakeTensorMode

from grcsf_fast import GRCSF, CompensationMaps, GRCSFLoss
from grcsf_fast.errors import ArgumentError, ArgumentTypeError, GrcsfError


def case(*spatial: int, channels: int = 2):
    logits = torch.randn(2, channels, *spatial)
    return logits, (torch.rand(2, channels, *spatial) < 0.1).float()


def maps_of(scores):
    return CompensationMaps({}, scores, None)


def scores_of(spatial, patch_size, levels=(0, 1)):
    grids = {level: [math.ceil(size / (patch_size * 2**level)) for size in spatial] for level in levels}
    return {level: torch.rand(2, 1, *grid) for level, grid in grids.items()}


def test_focal_loss_alone():
    logits, mask = case(16, 24)
    criterion = GRCSFLoss(segmentation="focal")
    assert torch.equal(criterion(logits, mask), FocalLoss()(logits, mask))
    scores = maps_of(scores_of((16, 24), 4))
    parts = criterion.parts((logits, scores), mask)
    assert torch.equal(parts["segmentation_loss"], FocalLoss()(logits, mask))
    assert torch.equal(parts["loss"], parts["segmentation_loss"] + 0.2 * parts["score_loss"])
    with pytest.raises(GrcsfError, match="segmentation: expected one of"):
        GRCSFLoss(segmentation="dice")


@pytest.mark.parametrize("softmax", [False, True])
def test_float64_is_computed_in_it(softmax):
    logits, mask = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True), torch.zeros(2, 3, 4, 4)
    mask[:, 0] = 1
    for segmentation in ("focal", "dice-focal"):
        criterion = GRCSFLoss(segmentation=segmentation, softmax=softmax)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without softmax
            assert torch.autograd.gradcheck(lambda given, of=criterion: of(given, mask), logits)


def test_logits_alone():
    logits, mask = case(16, 24)
    expected = DiceFocalLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, mask)
    assert torch.equal(GRCSFLoss()(logits, mask), expected)
    assert torch.equal(GRCSFLoss()(logits, mask.bool()), expected)
    assert torch.equal(GRCSFLoss()((logits, maps_of({})), mask), expected)


@pytest.mark.parametrize("spatial", [(16, 24), (8, 12, 16)])
def test_classes_that_exclude_each_other(spatial):
    """MONAI's numbers; no patch counts as lesion for what is none, which the first channel marks."""
    logits, numbers = torch.randn(2, 3, *spatial), (torch.rand(2, *spatial) < 0.02).long()
    numbers[1] *= 2
    mask = F.one_hot(numbers, 3).movedim(-1, 1).float()
    dice = DiceLoss(softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, mask)
    focal = FocalLoss(use_softmax=True)(logits, mask)
    torch.testing.assert_close(GRCSFLoss(softmax=True)(logits, mask), dice + focal)
    torch.testing.assert_close(GRCSFLoss(segmentation="focal", softmax=True)(logits, mask), focal)
    scores = maps_of(scores_of(spatial, 2))
    found = GRCSFLoss(softmax=True).parts((logits, scores), mask)["score_loss"]
    expected = GRCSFLoss().parts((logits[:, :1], scores), (numbers > 0)[:, None])["score_loss"]
    assert torch.equal(found, expected)


def test_one_class_is_no_choice():
    logits, mask = case(16, 24, channels=1)
    with pytest.raises(GrcsfError, match=r"^logits: expected at least two channels with softmax, got one"):
        GRCSFLoss(softmax=True)(logits, mask)


@pytest.mark.parametrize(("spatial", "patch_size"), [((33, 50), 4), ((64, 64), 8), ((12, 16, 9), 2), ((17, 64), 3)])
def test_scores_are_compared_with_the_lesion_in_their_patches(spatial, patch_size):
    logits, mask = case(*spatial)
    scores = scores_of(spatial, patch_size)
    losses = []
    for level, score in scores.items():
        edge = patch_size * 2**level
        target = torch.zeros_like(score)
        for batch, _, *place in mask.nonzero().tolist():
            target[(batch, 0, *[axis // edge for axis in place])] = 1
        losses.append(F.binary_cross_entropy(score, target))
    parts = GRCSFLoss(score_weight=0.3).parts((logits, maps_of(scores)), mask)
    torch.testing.assert_close(parts["score_loss"], torch.stack(losses).mean())
    assert torch.equal(parts["segmentation_loss"], GRCSFLoss()(logits, mask))
    assert torch.equal(parts["loss"], parts["segmentation_loss"] + 0.3 * parts["score_loss"])
    assert torch.equal(GRCSFLoss(0.3)((logits, maps_of(scores)), mask), parts["loss"])
    assert torch.equal(GRCSFLoss(0.3, patch_size)((logits, maps_of(scores)), mask), parts["loss"])


@pytest.mark.parametrize("spatial", [(50, 61), (9, 16, 21)])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_the_patch_size_of_a_network_is_found(spatial, patch_size):
    model = network(len(spatial), patch_size=patch_size).train()
    output = model(torch.randn(2, 1, *spatial), return_maps=True)
    mask = case(*spatial)[1]
    loss = GRCSFLoss()(output, mask)
    assert torch.equal(loss, GRCSFLoss(patch_size=patch_size)(output, mask))
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "score" in name)


@pytest.mark.parametrize(
    "spatial", [(16, 16), (24, 24), (40, 40), (48, 48), (56, 56), (48, 64), (40, 72), (8, 8, 8), (6, 10, 7)]
)
def test_crops_that_two_sizes_of_patches_cut_alike(spatial):
    """48 pixels are 6, 3 and 2 patches of edge 8 and of edge 9: the default network's is the power of two."""
    channels = {"residual_channels": 2, "num_heads": 1}
    model = GRCSF(len(spatial), 1, 2, features=(2, 2, 2, 2, 2), **channels)
    output = model(torch.randn(2, 1, *spatial), return_maps=True)
    mask = case(*spatial)[1]
    assert torch.equal(GRCSFLoss()(output, mask), GRCSFLoss(patch_size=model.config["patch_size"])(output, mask))


@pytest.mark.parametrize(
    ("spatial", "patch_size", "fit"),
    [((28, 28), 8, "7, 8, 9"), ((24, 24), 12, "12, 13, 14"), ((32, 32), 12, "11, 12, 13")],
)
def test_shapes_that_do_not_tell_the_patch_size(spatial, patch_size, fit):
    """Of one that divides the image and a power of two, and of neither, nothing is guessed."""
    logits, mask = case(*spatial)
    output = logits, maps_of(scores_of(spatial, patch_size, (0, 1, 2)))
    with pytest.raises(GrcsfError, match=rf"\[{fit}.*; pass GRCSFLoss\(patch_size=network.config\['patch_size'\]\)"):
        GRCSFLoss()(output, mask)
    assert GRCSFLoss(patch_size=patch_size)(output, mask).isfinite()


def test_one_patch_is_the_whole_image_whatever_its_edge():
    logits, mask = case(7, 5)
    output = logits, maps_of(scores_of((7, 5), 8))
    assert torch.equal(GRCSFLoss()(output, mask), GRCSFLoss(patch_size=8)(output, mask))


def test_what_does_not_fit():
    logits, mask = case(32, 32)
    with pytest.raises(GrcsfError, match=r"^mask: expected shape \(2, 2, 32, 32\) of the logits, got \(2, 1, 32, 32\)"):
        GRCSFLoss()(logits, mask[:, :1])
    output = logits, maps_of(scores_of((32, 32), 4))
    with pytest.raises(GrcsfError, match=r"^patch_scores: expected shape \(2, 1, 4, 4\) of level 0"):
        GRCSFLoss(patch_size=8)(output, mask)
    for weight in (-0.1, math.nan):
        with pytest.raises(GrcsfError, match=r"^score_weight: expected 0 or more"):
            GRCSFLoss(weight)


@pytest.mark.parametrize(
    ("mask", "found"),
    [(torch.tensor([[[[0.0, 3.0], [1.0, 2.0]]]]), "values from 0 to 3"), (torch.ones(1, 1, 2, 2).int(), "torch.int32")],
)
def test_the_score_loss_alone_takes_no_numbers_of_labels(mask, found):
    scores = {0: torch.full((1, 1, 2, 2), 0.5)}
    with pytest.raises(GrcsfError, match=rf"^mask: expected .* got {found}"):
        GRCSFLoss(patch_size=1).score_loss(scores, mask)
    lesion = (mask > 0).float()
    expected = GRCSFLoss(patch_size=1).parts((lesion, maps_of(scores)), lesion)["score_loss"]
    assert torch.equal(GRCSFLoss(patch_size=1).score_loss(scores, lesion), expected)


def test_a_network_that_has_diverged():
    logits, mask = case(32, 32)
    scores = {level: torch.full_like(score, math.nan) for level, score in scores_of((32, 32), 4).items()}
    parts = GRCSFLoss().parts((logits * math.nan, maps_of(scores)), mask)
    assert all(parts[name].isnan() for name in ("loss", "segmentation_loss", "score_loss"))
    assert GRCSFLoss().parts((logits, maps_of(scores)), mask)["score_loss"].isnan()


def test_under_autocast():
    logits, mask = case(32, 32)
    output = logits.bfloat16(), maps_of(scores_of((32, 32), 4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = GRCSFLoss()(output, mask)
    torch.testing.assert_close(loss, GRCSFLoss()((output[0].float(), output[1]), mask))
    assert loss.dtype == torch.float32


def test_masks_of_other_values():
    logits, mask = case(16, 16)
    torch.testing.assert_close(GRCSFLoss()(logits, mask + 5e-4), GRCSFLoss()(logits, mask), rtol=0.01, atol=0)
    for wrong, span in ((mask * 255, "0 to 255"), (mask - 1, "-1 to 0"), (mask * math.nan, "nan to nan")):
        with pytest.raises(GrcsfError, match=f"^mask: expected 1 in lesions and 0 elsewhere, .* values from {span}$"):
            GRCSFLoss()(logits, wrong)


def test_what_has_no_values_or_one_for_each_of_many():
    """Tracing and transforms, where a check of values has nothing to ask; what is wrong is no number there."""
    logits, mask = case(16, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert GRCSFLoss()(logits.requires_grad_(), mask).shape == ()
    losses = torch.vmap(GRCSFLoss(segmentation="focal"))(logits[:, None], torch.stack([mask[:1], mask[1:] * 255]))
    assert losses[0] == GRCSFLoss(segmentation="focal")(logits[:1], mask[:1])
    assert losses[1].isnan()


def test_what_a_mask_of_classes_should_be():
    """Numbers where a channel for each is wanted, and classes for which ``softmax`` was forgotten."""
    numbers = torch.randint(0, 3, (2, 1, 8, 8))
    with pytest.raises(ArgumentError, match=r"got \(2, 1, 8, 8\); of numbers monai\.networks\.one_hot"):
        GRCSFLoss(softmax=True)(torch.zeros(2, 3, 8, 8), numbers)
    logits, classes = torch.zeros(2, 3, 8, 8), torch.nn.functional.one_hot(numbers[:, 0], 3).movedim(3, 1)
    with pytest.warns(UserWarning, match=r"^mask: every voxel is in one channel and no other, .*softmax=True"):
        GRCSFLoss()(logits, classes)
    regions = classes.clone()
    regions[0, :, 0, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRCSFLoss(softmax=True)(logits, classes)
        GRCSFLoss()(logits, regions)
        GRCSFLoss()(logits[:, :1], torch.ones(2, 1, 8, 8))


def test_what_is_no_output():
    with pytest.raises(ArgumentTypeError, match=r"^output: expected logits .*, got list; a list of images is stacked"):
        GRCSFLoss()([torch.zeros(1, 8, 8)] * 2, torch.zeros(2, 1, 8, 8))


def test_what_is_no_mask():
    said = r"^mask: expected a torch\.Tensor \(B,C,\*S\), got numpy\.ndarray; torch\.as_tensor makes one of it"
    with pytest.raises(ArgumentTypeError, match=said):
        GRCSFLoss()(torch.zeros(2, 1, 8, 8), np.zeros((2, 1, 8, 8)))
    with pytest.raises(ArgumentTypeError, match=said):
        GRCSFLoss().score_loss(scores_of((16, 24), 4), np.zeros((2, 1, 16, 24), np.float32))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("spatial", [(16, 24), (8, 12, 24)])
def test_voxels_that_nobody_annotated_count_nowhere(spatial, softmax):
    """The loss is that of the rest of the image alone, whatever mask and logits hold there, and its gradient too."""
    logits, mask = case(*spatial)
    if softmax:
        mask[:, :1] = 1 - mask[:, 1:]
    scores = scores_of(spatial, 2)
    ignored = torch.zeros(2, 1, *spatial)
    ignored[..., 16:] = 4
    rest = {level: score[..., : 8 // 2**level] for level, score in scores.items()}
    expected = GRCSFLoss(softmax=softmax).parts((logits[..., :16], maps_of(rest)), mask[..., :16])
    mask[..., 16:], logits[..., 20:] = 255, math.inf
    logits.requires_grad_()
    found = GRCSFLoss(softmax=softmax).parts((logits, maps_of(scores)), mask, ignored)
    torch.testing.assert_close(found, expected)
    found["loss"].backward()
    assert logits.grad is not None
    assert not logits.grad[..., 16:].any()
    assert logits.grad[..., :16].all()


def test_patches_that_hold_voxels_without_annotation():
    """One with lesion holds lesion; whether another one does nobody knows."""
    lesion, ignored = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    ignored[..., 2:, :] = True
    lesion[..., 0, 0] = 1
    score = torch.full((1, 1, 1, 2), 0.25)
    criterion = GRCSFLoss(patch_size=4)
    assert criterion.score_loss({0: score}, lesion, ignored) == pytest.approx(-math.log(0.25))
    assert criterion.score_loss({0: score}, lesion) == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2)


def test_an_image_without_any_annotation():
    """As a crop of one may be: nothing is learnt from it, and no number is lost."""
    logits, mask = case(16, 24)
    loss = GRCSFLoss()((logits.requires_grad_(), maps_of(scores_of((16, 24), 4))), mask, torch.ones(2, 1, 16, 24))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    with pytest.raises(ArgumentTypeError, match=r"^ignored: expected a tensor \(2, 1, 16, 24\), got list"):
        GRCSFLoss()(logits, mask, [1])
    with pytest.raises(ArgumentError, match=r"^ignored: expected shape \(2, 1, 16, 24\), got \(2, 2, 16, 24\)"):
        GRCSFLoss()(logits, mask, mask)


@pytest.mark.parametrize("patch_size", [0, -4, 2.0, 2.5, True, "4", [4, 4], (4,), 2**70])
def test_sizes_of_patches_that_cannot_be(patch_size):
    said = re.escape(f"patch_size: expected a whole number from 1 up, of 63 bits, got {patch_size!r}")
    with pytest.raises(ArgumentError, match=f"^{said}$"):
        GRCSFLoss(patch_size=patch_size)


def test_a_size_of_patches_may_be_numpys():
    assert repr(GRCSFLoss(patch_size=np.int64(4)).patch_size) == "4"
